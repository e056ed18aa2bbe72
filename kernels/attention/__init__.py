"""Softmax attention: causal or bidirectional, grouped heads, sliding windows, sinks, packed sequences, caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_flag, check_real, check_whole, floats, integers
from ..registry import Case, Draw, Op, register_op


def attention(
    q: Float[Tensor, "b tq h k"],
    k: Float[Tensor, "b tk g k"],
    v: Float[Tensor, "b tk g v"],
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    q_positions: Int[Tensor, "b tq"] | None = None,
    k_positions: Int[Tensor, "b tk"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b tq h v"]:
    """o = softmax(scale · q kᵀ) v over the keys that a query sees (arXiv 1706.03762).

    The query at position p sees the key at position s where s >= 0, and (not causal or s <= p), and (window is None or
    |p - s| < window or s < sinks). A query that sees no key gets zeros.

    Args:
        q: queries. Head i reads key-value head i // (h / g) (grouped-query attention, arXiv 2305.13245).
        k, v: keys and values; `g` divides `h`.
        causal: whether a query sees only keys up to its own position.
        window: how many positions back (and ahead, unless causal) are seen, the query's own included; None for all.
        sinks: the first positions, which stay visible outside the window (StreamingLLM, arXiv 2309.17453).
        scale: factor on the scores; k ** -0.5 by default.
        cu_seqlens: for packed sequences (b = 1, tq = tk): 0, then the running total of their lengths, int32 or int64.
            Positions then count within each sequence.
        q_positions: positions of the queries; by default they are the last tq keys.
        k_positions: positions of the keys, 0 … tk-1 by default; negative for a slot that holds no key.
        backend: "auto", "reference" or "chunked".

    Returns:
        The output in v's dtype. The softmax is taken in float32, or float64 where q is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(q, k, v, cu_seqlens, q_positions, k_positions)
    _check(q, k, v, causal, cu_seqlens, q_positions, k_positions)
    _check_options(window, sinks, scale, causal)
    return OP.dispatch(
        backend,
        q=q,
        k=k,
        v=v,
        causal=causal,
        window=window,
        sinks=sinks,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens=cu_seqlens,
        q_positions=q_positions,
        k_positions=k_positions,
    )


def _check_options(window, sinks, scale, causal) -> None:
    check_whole("window", window, least=1, optional=True)
    check_whole("sinks", sinks, least=0)
    check_real("scale", scale, optional=True)
    check_flag("causal", causal)


def _check(q, k, v, causal, cu_seqlens, q_positions, k_positions) -> None:
    b, tq, h, dk = q.shape
    tk, g = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != dk:
        raise UnsupportedShape(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}")
    if dk < 1:
        raise UnsupportedShape(f"q: shape {tuple(q.shape)} has no channels")
    if v.shape[:3] != k.shape[:3]:
        raise UnsupportedShape(f"v: shape {tuple(v.shape)} does not start with k's {tuple(k.shape[:3])}")
    if g < 1 or h % g:
        raise UnsupportedShape(f"k: its {g} heads must divide q's {h} heads")
    if q_positions is None and tq > tk and (causal or k_positions is not None):
        raise UnsupportedShape(f"q: {tq} queries cannot be the last of {tk} keys; pass q_positions")
    for name, positions, shape in (("q_positions", q_positions, (b, tq)), ("k_positions", k_positions, (b, tk))):
        if positions is not None and tuple(positions.shape) != shape:
            raise UnsupportedShape(f"{name}: shape {tuple(positions.shape)} is not {shape}")
    if cu_seqlens is not None and tq != tk:
        raise UnsupportedShape(f"cu_seqlens: packed sequences need tq = tk, not {tq} and {tk}")
    check_boundaries(cu_seqlens, b, tk)
    if cu_seqlens is not None and (q_positions is not None or k_positions is not None):
        raise UnsupportedShape("cu_seqlens: positions count within each sequence; pass no q_positions, k_positions")


def _empty(arguments: Mapping[str, Any]) -> Tensor | None:
    """No query has an output, and one without keys sees none."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    return None if q.numel() and k.numel() else v.new_zeros(*q.shape[:3], v.shape[3])


def _case(name: str, heads: int = 2, groups: int = 2, typical: dict[str, int] | None = None, **settings) -> Case:
    def arguments(draw: Draw, b: int, t: int, h: int, g: int, dk: int, dv: int):
        return {"q": draw.normal(b, t, h, dk), "k": draw.normal(b, t, g, dk), "v": draw.normal(b, t, g, dv), **settings}

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, heads, groups, 5, 7),
        bench=None if typical is None else lambda draw, t: arguments(draw, 1, t, 8, 8, 64, 64) | typical,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("causal", typical={}),
        _case("causal, grouped", heads=4),
        _case("causal, one key head", heads=3, groups=1, scale=0.5),
        _case("bidirectional", causal=False),
        _case("window", window=5, typical={"window": 512}),
        _case("window, sinks, grouped", heads=4, window=9, sinks=3),
        _case("bidirectional window", causal=False, window=4),
        _case("bidirectional window, sinks", causal=False, window=3, sinks=2, heads=4),
    )


OP = register_op(
    Op(
        name="attention",
        backends=backends("attention", "chunked", "reference"),
        sequences=("q", "k", "v"),
        cases=_cases,
        empty=_empty,
        summary="o = softmax(scale q k^T) v over the visible keys",
        tensors=floats(q=4, k=4, v=4) + integers(cu_seqlens=1, q_positions=2, k_positions=2, optional=True),
        causal=False,
    )
)
