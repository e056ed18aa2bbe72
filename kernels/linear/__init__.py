"""torch's linear layer, and for the few rows of a decoding step a product that reads the weights as fast as memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..backends import backends
from ..native import direct_limits
from ..registry import Case, Draw, Op, register_op

# Up to so many rows the time is that of reading the weights, and torch's matrix product takes longer.
ROWS = 4


def linear(
    x: Float[Tensor, "*rows i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, o] | None = None,
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
        RuntimeError: shapes that do not fit, as torch says it.
        BackendUnavailable: the named backend cannot serve the call.
    """
    return OP.dispatch(backend, x=x, weight=weight, bias=bias)


def _limits(arguments: Mapping[str, Any]) -> str | None:
    """Why native.cpp is not for this call."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if (reason := direct_limits(tensors)) is not None:
        return reason
    width, size, dtype = x.shape[-1] if x.ndim else 0, x.numel(), x.dtype
    if size > ROWS * width or size == 0:
        # Without the number: to write it down, torch.compile would fix the length.
        return f"it takes 1 to {ROWS} rows, and x has others"
    if dtype != torch.float32 and dtype != torch.float64:
        return f"it takes float32 and float64, not {dtype}"
    if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes do not fit, or the bias is broadcast; torch's function says or does it"
    for a in tensors:
        if a.dtype != dtype or a.layout is not torch.strided or a.stride(-1) != 1:
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
        follows_autocast=True,
    )
)
