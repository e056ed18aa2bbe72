"""Convolution with filters as long as the sequence: S4, S4D, H3 and Hyena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_state, floats, integers, untouched
from ..registry import Case, Draw, Op, register_op


def long_conv(
    u: Float[Tensor, "b t d"],
    filters: Float[Tensor, "h l"],
    *,
    skip: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "n d l_minus_1"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n d l_minus_1"]]:
    """y_t = skip ⊙ u_t + Σ_j filters[:, j] · u_{t-j}, j = 0 … l-1 (S4, arXiv 2111.00396, eq. 4; Hyena, 2302.10866).

    It is causal; a bidirectional layer has a second filter on the reversed sequence. Products of FFTs take O(t log t)
    steps; there is no Triton backend, because the FFT library's kernels are the ones to use on a GPU.

    Args:
        u: the inputs.
        filters: by lag, l >= 1: column 0 meets the current step (unlike `short_conv`, whose last column does). One
            a channel, or `h` that divides d: channel i uses filter i // (d / h).
        skip: weight of the current input, added to the filter's, per channel (S4's D).
        initial_state: the l - 1 inputs before the first, oldest first; zeros by default. One per sequence: n = b, or
            the number of packed sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference" or "chunked".

    Returns:
        The output, and the last l - 1 inputs of each sequence, both in u's dtype. Sums are taken in float32, or float64
        where u is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(u, filters, skip, initial_state, cu_seqlens)
    _check(u, filters, skip, initial_state, cu_seqlens)
    return OP.dispatch(backend, u=u, filters=filters, skip=skip, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _check(u, filters, skip, initial_state, cu_seqlens) -> None:
    b, t, d = u.shape
    h, length = filters.shape
    if length < 1:
        raise UnsupportedShape(f"filters: shape {tuple(filters.shape)} has no taps; l >= 1 must hold")
    if h < 1 or d % h:
        raise UnsupportedShape(f"filters: their number {h} must divide u's {d} channels")
    if skip is not None and tuple(skip.shape) != (d,):
        raise UnsupportedShape(f"skip: shape {tuple(skip.shape)} is not {(d,)}")
    check_boundaries(cu_seqlens, b, t)
    check_state(initial_state, b, cu_seqlens, d, length - 1)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    u = arguments["u"]
    if u.numel():
        return None
    return u.new_zeros(u.shape), untouched(arguments, u, u.dtype, u.shape[2], arguments["filters"].shape[1] - 1)


def _traffic(arguments: Mapping[str, Any]) -> float:
    """Inputs and filters once in, outputs once out."""
    u, filters = arguments["u"], arguments["filters"]
    return 2.0 * u.numel() * u.element_size() + filters.numel() * filters.element_size()


def _case(name: str, length: int, groups: int, skip: bool = False, typical: tuple[int, int] | None = None) -> Case:
    def arguments(draw: Draw, b: int, t: int, h: int, d: int, taps: int):
        made = {"u": draw.normal(b, t, d), "filters": draw.normal(h, taps, scale=taps**-0.5)}
        return made | ({"skip": draw.normal(d)} if skip else {})

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, groups, 4, length),
        state=lambda draw, n: draw.normal(n, 4, length - 1),
        bench=(lambda draw, t: arguments(draw, 1, t, *typical, t)) if typical else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("a filter a channel, skip", 40, 4, skip=True, typical=(256, 256)),
        _case("short filters, grouped", 5, 2),
        _case("filters beyond the sequence, grouped, skip", 150, 2, skip=True),
        _case("one tap", 1, 4),
    )


OP = register_op(
    Op(
        name="long_conv",
        backends=backends("long_conv", "chunked", "reference"),
        sequences=("u",),
        cases=_cases,
        traffic=_traffic,
        empty=_empty,
        summary="y_t = skip u_t + sum_j filters[:, j] u_{t-j}",
        tensors=floats(u=3, filters=2)
        + floats(skip=1, initial_state=3, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
