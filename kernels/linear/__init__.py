"""torch's linear layer, and for the few rows of a decoding step a product that reads the weights as fast as memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import UnsupportedShape
from ...utils.modes import autocast_enabled
from ..backends import backends
from ..common.checks import RANK_FROM_1, floats
from ..native import direct_limits
from ..registry import Case, Draw, Op, register_op

# Up to so many rows the time is that of reading the weights, and torch's matrix product takes longer.
ROWS = 4


def linear(
    x: Float[Tensor, "*rows i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*rows o"]:
    """y = x Wᵀ + b, as torch.nn.functional.linear, which "chunked" is; autocast casts it as that.

    On CPUs a product with few rows takes the time in which its weights are read, and BLAS takes twice that. Where no
    gradient is asked for, up to ROWS rows of float32 or float64 therefore run in C++ ("native").

    Args:
        x: any leading dimensions.
        weight: one row per output.
        bias: none by default.
        backend: "auto", "reference", "chunked" or "native".

    Returns:
        The output in x's dtype.

    Raises:
        UnsupportedShape: shapes or dtypes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, weight, bias)
    _check(x, weight, bias)
    return OP.dispatch(backend, x=x, weight=weight, bias=bias)


def _check(x, weight, bias) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} does not fit x's {tuple(x.shape)}; it is (o, i)")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise UnsupportedShape(f"bias: shape {tuple(bias.shape)} is not {tuple(weight.shape[:1])}")
    if (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)) and not autocast_enabled(
        x.device.type
    ):
        name, other = ("weight", weight) if weight.dtype != x.dtype else ("bias", bias)
        raise UnsupportedShape(f"{name}: dtype {other.dtype} is not that of x, {x.dtype}")


def _limits(arguments: Mapping[str, Any]) -> str | None:
    """Why native.cpp is not for this call."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # First why most calls in training are not for it; a comparison while torch.compile traces would fix the length.
    if not torch.compiler.is_compiling() and not 0 < x.numel() <= ROWS * x.shape[-1]:
        return f"it takes 1 to {ROWS} rows, and x has others"
    if (reason := direct_limits(tensors)) is not None:
        return reason
    dtype = x.dtype
    if dtype != torch.float32 and dtype != torch.float64:
        return f"it takes float32 and float64, not {dtype}"
    for a in tensors:
        if a.dtype != dtype or a.stride(-1) != 1:
            return "it takes one dtype, and neighbouring elements in the last dimension"
    return None


def _case(name: str, bias: bool = True, typical: tuple[int, int] | None = None) -> Case:
    def arguments(draw: Draw, b: int, t: int, inputs: int, outputs: int):
        weight = draw.normal(outputs, inputs, scale=inputs**-0.5)
        return {"x": draw.normal(b, t, inputs), "weight": weight} | ({"bias": draw.normal(outputs)} if bias else {})

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 7, 5),
        packed=False,
        bench=None if typical is None else lambda draw, t: arguments(draw, 1, t, *typical),
    )


def _cases() -> tuple[Case, ...]:
    return (_case("bias"), _case("no bias", bias=False))


def _flops(arguments: Mapping[str, Any]) -> float:
    return 2.0 * arguments["x"].numel() * arguments["weight"].shape[0]


OP = register_op(
    Op(
        name="linear",
        backends=backends("linear", "native", "chunked", "reference", native=_limits),
        sequences=("x",),
        cases=_cases,
        flops=_flops,
        summary="y = x W^T + b",
        tensors=floats(x=RANK_FROM_1, weight=2) + floats(bias=1, optional=True),
        follows_autocast=True,
    )
)
