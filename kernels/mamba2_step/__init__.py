"""A decoding step of Mamba-2 between its projections: convolution, step size, recurrence and skip in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import floats
from ..native import direct_limits
from ..registry import Case, Draw, Op, register_op

# Channels of the keys that a Triton program holds.
WIDEST = 256


def mamba2_step(
    xbc: Float[Tensor, "b c"],
    dt: Float[Tensor, "b h"],
    conv_weight: Float[Tensor, "c w"],
    conv_bias: Float[Tensor, " c"],
    dt_bias: Float[Tensor, " h"],
    A_log: Float[Tensor, " h"],
    D: Float[Tensor, " h"],
    window: Float[Tensor, "b c w_minus_1"],
    memory: Float[Tensor, "b h k v"],
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h*v"], Float[Tensor, "b c w_minus_1"], Float[Tensor, "b h k v"]]:
    """x, B, C = silu(conv(xbc)),  Δ = softplus(dt + dt_bias),  S' = e^{-Δ e^{A_log}} S + B (Δ x)ᵀ,  y = S'ᵀ C + D x.

    Mamba-2 (arXiv 2405.21060), one step: what `short_conv` and `gated_linear` give with the arithmetic between them, a
    dozen calls, most of which take longer than their work.

    Args:
        xbc: x, B and C before the convolution, c = h v + 2 g k channels; `g` groups of heads share B and C.
        dt: the step sizes before the softplus.
        conv_weight, conv_bias: of the short convolution, as in `short_conv`.
        dt_bias, A_log, D: per head.
        window: the convolution's state, the w - 1 inputs before this one.
        memory: the recurrence's state S.
        backend: "auto", "reference", "chunked", "native" or "triton"; the last two without gradients.

    Returns:
        y in xbc's dtype, and the next window and memory, in the dtypes of `short_conv`'s and `gated_linear`'s states:
        xbc's, and float32, or float64 where xbc is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(xbc, dt, conv_weight, conv_bias, dt_bias, A_log, D, window, memory)
    _check(xbc, dt, conv_weight, conv_bias, dt_bias, A_log, D, window, memory)
    return OP.dispatch(
        backend,
        xbc=xbc,
        dt=dt,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        window=window,
        memory=memory,
    )


def _check(xbc, dt, conv_weight, conv_bias, dt_bias, A_log, D, window, memory) -> None:
    (b, c), (h, k, v), w = xbc.shape, memory.shape[1:], conv_weight.shape[1]
    shared = c - h * v
    if w < 1 or k < 1 or shared < 2 * k or shared % (2 * k) or h % (shared // (2 * k)):
        raise UnsupportedShape(
            f"xbc: {c} channels are not h v + 2 g k for memory {tuple(memory.shape)} and groups g that divide h"
        )
    for name, x, wanted in (
        ("dt", dt, (b, h)),
        ("conv_weight", conv_weight, (c, w)),
        ("conv_bias", conv_bias, (c,)),
        ("dt_bias", dt_bias, (h,)),
        ("A_log", A_log, (h,)),
        ("D", D, (h,)),
        ("window", window, (b, c, w - 1)),
        ("memory", memory, (b, h, k, v)),
    ):
        if x.shape != wanted:
            raise UnsupportedShape(f"{name}: shape {tuple(x.shape)} is not {wanted}")


def _limits(arguments: Mapping[str, Any]) -> str | None:
    dtype = arguments["xbc"].dtype
    if dtype != torch.float32 and dtype != torch.float64:
        return f"it takes float32 and float64, not {dtype}"
    for x in arguments.values():
        if x.dtype != dtype:
            return f"it takes one dtype, not {dtype} and {x.dtype}"
    return direct_limits(arguments.values())


def _triton_limits(arguments: Mapping[str, Any]) -> str | None:
    if (width := arguments["memory"].shape[2]) > WIDEST:
        return f"its kernel holds keys of at most {WIDEST} channels, not {width}"
    return direct_limits(arguments.values(), cpu=False)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    xbc, window, memory = (arguments[name] for name in ("xbc", "window", "memory"))
    if xbc.shape[0]:
        return None
    wide = torch.promote_types(xbc.dtype, torch.float32)
    y = xbc.new_zeros(0, memory.shape[1] * memory.shape[3])
    return y, window.to(xbc.dtype), memory.to(wide)


def _case(name: str, groups: int, taps: int, heads: int = 4) -> Case:
    def arguments(draw: Draw, rows: int, heads: int, k: int, v: int) -> dict[str, Any]:
        channels = heads * v + 2 * groups * k
        return {
            "xbc": draw.normal(rows, channels),
            "dt": draw.normal(rows, heads),
            "conv_weight": draw.normal(channels, taps, scale=taps**-0.5),
            "conv_bias": draw.normal(channels, scale=0.1),
            "dt_bias": draw.uniform(-4.0, 0.0, heads),
            "A_log": draw.uniform(0.0, 2.0, heads),
            "D": draw.normal(heads),
            "window": draw.normal(rows, channels, taps - 1),
            "memory": draw.normal(rows, heads, k, v),
        }

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b * t, heads, 3, 5),
        packed=False,
        # Mamba-2's sizes at 130 M parameters.
        compile=(lambda draw: arguments(draw, 2, 24, 128, 64)) if groups == 1 and taps == 4 else None,
    )


def _cases() -> tuple[Case, ...]:
    return (_case("one group", 1, 4), _case("groups", 2, 3), _case("one tap", 1, 1))


OP = register_op(
    Op(
        name="mamba2_step",
        backends=backends(
            "mamba2_step", "triton", "native", "chunked", "reference", native=_limits, triton_limits=_triton_limits
        ),
        sequences=(),
        cases=_cases,
        causal=False,
        empty=_empty,
        summary="S' = e^{-dt A} S + dt B x^T, y = S'^T C + D x after the short convolution, one step",
        tensors=floats(xbc=2, dt=2, conv_weight=2, conv_bias=1, dt_bias=1, A_log=1, D=1, window=3, memory=4),
    )
)
