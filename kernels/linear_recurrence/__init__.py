"""Elementwise linear recurrence, real or complex: what LRU, S5, HGRN, RG-LRU and Bi-WKV stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_flag, check_state, has_shape, integers, numbers, untouched
from ..registry import Case, Draw, Op, complex_of, register_op


def linear_recurrence(
    x: Float[Tensor, "b t d"] | Complex[Tensor, "b t d"],
    a: Float[Tensor, "..."] | Complex[Tensor, "..."],
    *,
    reverse: bool = False,
    initial_state: Float[Tensor, "s d"] | Complex[Tensor, "s d"] | None = None,
    cu_seqlens: Int[Tensor, " s_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"] | Complex[Tensor, "b t d"], Float[Tensor, "s d"] | Complex[Tensor, "s d"]]:
    """h_t = a_t ⊙ h_{t-1} + x_t  (LRU, arXiv 2303.06349, eq. 1; RG-LRU, arXiv 2402.19427, eq. 4).

    Args:
        x: the inputs; complex64 or complex128 for a complex recurrence.
        a: the factors, `(b, t, d)` or the same at every step, `(d,)`; complex where x is. Of magnitude at most 1, or
            the recurrence may overflow (not checked, for speed).
        reverse: whether to run back in time: h_t = a_t ⊙ h_{t+1} + x_t. The final state is then that of the first step.
        initial_state: the state to resume from, zeros by default; one per sequence: s = b, or the number of packed
            sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference", "chunked", "native" or "triton".

    Returns:
        Every h_t in x's dtype, and the state after the last step: float32 or complex64, or twice as wide where x is.

    Raises:
        UnsupportedShape: shapes or dtypes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, a, initial_state, cu_seqlens)
    check_flag("reverse", reverse)
    _check(x, a, initial_state, cu_seqlens)
    return OP.dispatch(backend, x=x, a=a, reverse=reverse, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _check(x, a, initial_state, cu_seqlens) -> None:
    b, t, d = x.shape
    if not has_shape(a, d) and not has_shape(a, b, t, d):
        raise UnsupportedShape(f"a: shape {tuple(a.shape)} is neither {(d,)} nor {(b, t, d)}")
    for name, value in (("a", a), ("initial_state", initial_state)):
        if value is not None and value.is_complex() != x.is_complex():
            raise UnsupportedShape(f"{name}: {value.dtype} does not go with x's {x.dtype}; make both real or complex")
    check_boundaries(cu_seqlens, b, t)
    check_state(initial_state, b, cu_seqlens, d)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    x = arguments["x"]
    if x.numel():
        return None
    return x.new_zeros(x.shape), untouched(arguments, x, torch.promote_types(x.dtype, torch.float32), x.shape[2])


def _traffic(arguments: Mapping[str, Any]) -> float:
    """x and a are read once, and h written."""
    x, a = arguments["x"], arguments["a"]
    return float(2 * x.numel() * x.element_size() + a.numel() * a.element_size())


def _arguments(draw: Draw, b: int, t: int, d: int, constant: bool, turning: bool, reverse: bool) -> dict[str, Any]:
    shape = (d,) if constant else (b, t, d)
    a = draw.log_decay(*shape).exp()
    if turning:
        wide = complex_of(draw.dtype)
        angle = draw.uniform(-3.0, 3.0, *shape)
        a = torch.polar(*(p.to(wide.to_real()) for p in (a, angle)))
    return {"x": (draw.complex_normal if turning else draw.normal)(b, t, d), "a": a, "reverse": reverse}


def _case(
    name: str, constant: bool = False, turning: bool = False, reverse: bool = False, compiled: bool = False
) -> Case:
    kind = {"constant": constant, "turning": turning, "reverse": reverse}
    return Case(
        name=name,
        make=lambda draw, b, t: _arguments(draw, b, t, 10, **kind),
        state=lambda draw, s: (draw.complex_normal if turning else draw.normal)(s, 10),
        compile=(lambda draw: _arguments(draw, 1, 2048, 1024, **kind)) if compiled else None,
        bench=(lambda draw, t: _arguments(draw, 1, t, 1024, **kind)) if compiled else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("factor per step", compiled=True),
        _case("constant factor", constant=True),
        _case("reversed", reverse=True),
        _case("complex", turning=True, compiled=True),
        _case("complex, constant factor, reversed", constant=True, turning=True, reverse=True),
    )


OP = register_op(
    Op(
        name="linear_recurrence",
        backends=backends("linear_recurrence", "native", "triton", "chunked", "reference"),
        sequences=("x", "a"),
        cases=_cases,
        traffic=_traffic,
        empty=_empty,
        summary="h_t = a_t ⊙ h_{t-1} + x_t, real or complex, forwards or back in time",
        tensors=numbers(x=3, a=(1, 3))
        + numbers(initial_state=2, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
