"""Causal depthwise convolution over a few steps, with a state: what stands in front of Mamba, GLA and DeltaNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnknownName, UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_state, floats, integers, untouched
from ..registry import Case, Draw, Op, register_op


def short_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Float[Tensor, "n d w_minus_1"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n d w_minus_1"]]:
    """y_t = act(bias + Σ_j weight[:, w-1-j] · x_{t-j}), j = 0 … w-1: one filter a channel (Mamba, arXiv 2312.00752).

    `weight` is torch's Conv1d weight without its middle dimension: its last column meets the current step.

    Args:
        x: the inputs.
        weight: the filters, w >= 1.
        bias: added before the activation.
        activation: None or "silu".
        initial_state: the w - 1 inputs before the first, oldest first; zeros by default. One per sequence: n = b, or
            the number of packed sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference", "chunked", "native" or "triton".

    Returns:
        The output, and the last w - 1 inputs of each sequence, both in x's dtype. Sums are taken in float32, or float64
        where x is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, weight, bias, initial_state, cu_seqlens)
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    return OP.dispatch(
        backend,
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _check(x, weight, bias, activation, initial_state, cu_seqlens) -> None:
    b, t, d = x.shape
    width = weight.shape[-1]
    if weight.shape[0] != d or width < 1:
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} is not (d, w) with d = {d} and w >= 1")
    if bias is not None and tuple(bias.shape) != (d,):
        raise UnsupportedShape(f"bias: shape {tuple(bias.shape)} is not {(d,)}")
    if activation not in (None, "silu"):
        raise UnknownName("activation of short_conv", activation, ["silu"])
    check_boundaries(cu_seqlens, b, t)
    check_state(initial_state, b, cu_seqlens, d, width - 1)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    x = arguments["x"]
    if x.numel():
        return None
    return x.new_zeros(x.shape), untouched(arguments, x, x.dtype, x.shape[2], arguments["weight"].shape[1] - 1)


def _case(
    name: str,
    width: int = 4,
    bias: bool = True,
    activation: str | None = "silu",
    compiled: bool = False,
    timed: bool = False,
) -> Case:
    def arguments(draw: Draw, b: int, t: int, d: int):
        made = {"x": draw.normal(b, t, d), "weight": draw.normal(d, width, scale=width**-0.5), "activation": activation}
        return made | ({"bias": draw.normal(d)} if bias else {})

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 6),
        state=lambda draw, n: draw.normal(n, 6, width - 1),
        compile=(lambda draw: arguments(draw, 2, 2048, 1536)) if compiled else None,
        bench=(lambda draw, t: arguments(draw, 1, t, 1536)) if timed else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("silu, bias", compiled=True, timed=True),
        _case("silu", bias=False),
        _case("bias", activation=None),
        _case("linear, width 3", width=3, bias=False, activation=None, compiled=True),
        _case("width 2", width=2),
        _case("width 1", width=1),
    )


OP = register_op(
    Op(
        name="short_conv",
        backends=backends("short_conv", "triton", "native", "chunked", "reference"),
        sequences=("x",),
        cases=_cases,
        traffic=lambda arguments: 2.0 * arguments["x"].numel() * arguments["x"].element_size(),
        empty=_empty,
        summary="y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j})",
        tensors=floats(x=3, weight=2)
        + floats(bias=1, initial_state=3, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
