"""Softmax attention over chosen blocks of keys: the kernel of every sparse pattern, static, learned or estimated.

Builders of the lists (windows, global and random blocks, axes of a grid, MoBA, NSA, ...) are in `lists`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_flag, check_real, check_whole, floats, integers
from ..common.tools import triton_refusal
from ..registry import Case, Draw, Op, register_op

# Channels of a head that Triton's kernels take.
WIDEST = 256


def block_sparse(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    blocks: Int[Tensor, "b_or_1 n_rows f n"],
    *,
    block_size: int,
    query_block: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    q_positions: Int[Tensor, "b t"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b t h v"]:
    """o = softmax(scale · q kᵀ) v over the keys in the blocks that are listed for a query (BigBird, arXiv 2007.14062;
    NSA, arXiv 2502.11089, eq. 11 and 12).

    Key j is in block j // block_size, query i in row i // query_block of the lists. A query at position p sees the keys
    of the blocks in its row, and of these, if causal, the ones at j <= p. A query that sees no key gets zeros.

    Args:
        q: queries. Head i reads key-value head i // (h / g).
        k, v: keys and values, key j at position j; `g` divides `h`.
        blocks: for each row of queries the indices of key blocks, in any order, int32 or int64. Negative indices and
            those past the last block name no block; one that is listed twice counts once. `f` groups of heads have
            lists of their own, head i the one of group i // (h / f): 1, g, h or any number that divides h and of which
            it is true that it divides g or is divided by it. There are ceil(t / query_block) rows; the first dimension
            is 1 where the whole batch shares its lists.
        block_size: keys in a block; the last block may have fewer.
        query_block: queries in a row; block_size by default.
        causal: whether a query sees only keys up to its own position.
        scale: factor on the scores; k ** -0.5 by default.
        cu_seqlens: for packed sequences (b = 1, t = s): 0, then the running total of their lengths, int32 or int64.
            Rows, blocks and positions then count within each sequence; their rows follow each other in `blocks`.
        q_positions: positions of the queries; by default they are the last t keys. Where causal, keys may
            come after the last position and hold no token yet (a cache with spare capacity).
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        The output in v's dtype. The softmax is taken in float32, or float64 where an input is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(q, k, v, blocks, cu_seqlens, q_positions)
    query_block = block_size if query_block is None else query_block
    _check_options(block_size, query_block, scale, causal)
    _check(q, k, v, blocks, query_block, causal, cu_seqlens, q_positions)
    return OP.dispatch(
        backend,
        q=q,
        k=k,
        v=v,
        blocks=blocks,
        block_size=block_size,
        query_block=query_block,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens=cu_seqlens,
        q_positions=q_positions,
    )


def _check_options(block_size, query_block, scale, causal) -> None:
    check_whole("block_size", block_size, least=1)
    check_whole("query_block", query_block, least=1)
    check_real("scale", scale, optional=True)
    check_flag("causal", causal)


def _check(q, k, v, blocks, query_block, causal, cu_seqlens, q_positions) -> None:
    (b, t, h, dk), (s, g) = q.shape, k.shape[1:3]
    f = blocks.shape[2]
    if k.shape[0] != b or k.shape[3] != dk:
        raise UnsupportedShape(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}")
    if dk < 1:
        raise UnsupportedShape(f"q: shape {tuple(q.shape)} has no channels")
    if v.shape[:3] != k.shape[:3]:
        raise UnsupportedShape(f"v: shape {tuple(v.shape)} does not start with k's {tuple(k.shape[:3])}")
    if g < 1 or h % g:
        raise UnsupportedShape(f"k: its {g} heads must divide q's {h} heads")
    if blocks.shape[0] not in (1, b) or f < 1 or h % f or (f % g and g % f):
        raise UnsupportedShape(f"blocks: shape {tuple(blocks.shape)}; pass ({b}, rows, f, n) with f one of 1, {g}, {h}")
    if q_positions is not None and tuple(q_positions.shape) != (b, t):
        raise UnsupportedShape(f"q_positions: shape {tuple(q_positions.shape)} is not {(b, t)}")
    if q_positions is None and causal and t > s:
        raise UnsupportedShape(f"q: {t} queries cannot be the last of {s} keys; pass q_positions")
    if cu_seqlens is not None and t != s:
        raise UnsupportedShape(f"cu_seqlens: packed sequences need t = s, not {t} and {s}")
    check_boundaries(cu_seqlens, b, s)
    if cu_seqlens is not None and q_positions is not None:
        raise UnsupportedShape("cu_seqlens: positions count within each sequence; pass no q_positions")
    rows = _rows(t, query_block, cu_seqlens)
    if rows is not None and blocks.shape[1] != rows:
        raise UnsupportedShape(f"blocks: {blocks.shape[1]} rows; {t} queries in rows of {query_block} need {rows}")


def _rows(t: int, query_block: int, cu_seqlens: Tensor | None) -> int | None:
    if cu_seqlens is None or query_block == 1:
        return -(-t // query_block)
    # Their number is in the tensor, which a trace cannot read and a GPU would have to be waited for.
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return None
    return int(((cu_seqlens.diff() + query_block - 1) // query_block).sum())


def _empty(arguments: Mapping[str, Any]) -> Tensor | None:
    """No query has an output, and one without keys sees none."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    return None if q.numel() and k.numel() else v.new_zeros(*q.shape[:3], v.shape[3])


def _triton_refusal(arguments: Mapping[str, Any]) -> str | None:
    widest = max(arguments["q"].shape[-1], arguments["v"].shape[-1])
    if widest > WIDEST:
        return f"its kernels hold a head's channels at once, at most {WIDEST}, and q or v has {widest}"
    return triton_refusal(arguments)


def _flops(arguments: Mapping[str, Any]) -> float:
    """Of the products with the listed blocks, whether or not causality hides a part of them."""
    q, v, blocks, size = (arguments[name] for name in ("q", "v", "blocks", "block_size"))
    query_block = arguments.get("query_block") or size
    listed = float((blocks >= 0).sum()) * q.shape[2] / blocks.shape[2]
    return 2.0 * listed * size * query_block * (q.shape[3] + v.shape[3])


def _some_blocks(draw: Draw, b: int, rows: int, f: int, n: int, count: int) -> Tensor:
    """Lists of which some name a block twice, a block past the end, or none."""
    return draw.integers(count + 2, b, rows, f, n) - 1


def _one_in_eight(rows: int, f: int, draw: Draw) -> Tensor:
    """An eighth of the blocks that a query sees, its own among them."""
    own = torch.arange(rows, device=draw.device)[:, None, None]
    chosen = draw.uniform(0, 1, rows, f, rows).float().masked_fill(own.mT >= own, 2).argsort(-1)
    chosen = chosen[..., : max(rows // 8, 1)]
    many = torch.arange(chosen.shape[-1], device=draw.device) < (own + 1) // 8
    listed = torch.where(many & (chosen < own), chosen, -1)
    return torch.cat([listed, own.expand(-1, f, -1)], -1)[None]


def _case(
    name: str,
    sizes: tuple[int, int],
    *,
    heads: int,
    groups: int,
    lists: int,
    packed: bool = False,
    compiled: tuple[int, int, int, int] | None = None,
    typical: bool = False,
    **settings,
) -> Case:
    size, row = sizes

    def arguments(draw: Draw, b: int, t: int):
        # Rows of one query each are sequences, which the laws cut and pack; others are shared by the batch.
        blocks = _some_blocks(draw, b if row == 1 else 1, -(-t // row), lists, 3 if row > 1 else 2, -(-t // size))
        made = {"q": draw.normal(b, t, heads, 5), "k": draw.normal(b, t, groups, 5), "v": draw.normal(b, t, groups, 7)}
        return made | {"blocks": blocks, "block_size": size, "query_block": row, **settings}

    def sized(draw: Draw, t: int, h: int, g: int, f: int):
        made = {"q": draw.normal(1, t, h, 64), "k": draw.normal(1, t, g, 64), "v": draw.normal(1, t, g, 64)}
        return made | {"blocks": _one_in_eight(-(-t // 64), f, draw), "block_size": 64, "query_block": 64}

    def large(draw: Draw, h: int, g: int, f: int, row: int):
        made = {"q": draw.normal(1, 2048, h, 128), "k": draw.normal(1, 2048, g, 128), "v": draw.normal(1, 2048, g, 128)}
        blocks = draw.integers(32, 1, 2048 // row, f, 16)
        return made | {"blocks": blocks, "block_size": 64, "query_block": row, **settings}

    return Case(
        name=name,
        make=arguments,
        packed=packed,
        compile=(lambda draw: large(draw, *compiled)) if compiled else None,
        bench=(lambda draw, t: sized(draw, t, 8, 8, 8)) if typical else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("a list a query, grouped", (4, 1), heads=2, groups=1, lists=1, packed=True, compiled=(64, 4, 4, 1)),
        _case("rows of queries, one list", (16, 16), heads=2, groups=2, lists=1, compiled=(8, 8, 8, 64), typical=True),
        _case("bidirectional, a list a head", (7, 20), heads=2, groups=1, lists=2, causal=False, scale=0.5),
    )


OP = register_op(
    Op(
        name="block_sparse",
        backends=backends("block_sparse", "triton", "chunked", "reference", triton=_triton_refusal),
        sequences=("q", "k", "v", "blocks", "q_positions"),
        cases=_cases,
        flops=_flops,
        empty=_empty,
        summary="o = softmax(scale q k^T) v over the keys of the listed blocks",
        tensors=floats(q=4, k=4, v=4) + integers(blocks=4) + integers(cu_seqlens=1, q_positions=2, optional=True),
        causal=False,
    )
)
