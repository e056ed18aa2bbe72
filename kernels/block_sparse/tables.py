"""Where rows of queries and blocks of keys lie, for single and packed sequences; nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """Rows are those of the lists; blocks are numbered through, over all packed sequences.

    Args:
        start, stop: the queries of each row.
        first, count: the first block of the row's sequence, and how many that has.
        key_start, key_stop: the keys of each block; none for blocks that packed sequences might have had.
        key_position: the position of each block's first key.
        positions: of the queries, (b or 1, t).
    """

    start: Tensor
    stop: Tensor
    first: Tensor
    count: Tensor
    key_start: Tensor
    key_stop: Tensor
    key_position: Tensor
    positions: Tensor


def tables(
    t: int,
    s: int,
    rows: int,
    block_size: int,
    query_block: int,
    cu_seqlens: Tensor | None,
    q_positions: Tensor | None,
    device: torch.device,
) -> Tables:
    """The tables of one call."""
    row = torch.arange(rows, device=device)
    if cu_seqlens is None:
        start, blocks = row * query_block, -(-s // block_size)
        key_start = torch.arange(blocks, device=device) * block_size
        positions = torch.arange(s - t, s, device=device)[None] if q_positions is None else q_positions.long()
        zero = torch.zeros_like(row)
        return Tables(
            start,
            (start + query_block).clamp(max=t),
            zero,
            zero + blocks,
            key_start,
            (key_start + block_size).clamp(max=s),
            key_start,
            positions,
        )
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    sequence, within = _numbered((lengths + query_block - 1) // query_block, row)
    key_sequence, block = _numbered(
        (lengths + block_size - 1) // block_size, torch.arange(s // block_size + len(lengths), device=device)
    )
    # After the last sequence follows an empty one, for rows and blocks that are none.
    ends, begins = torch.cat([bounds[1:], bounds[-1:]]), torch.cat([bounds[:-1], bounds[-1:]])
    counts = torch.nn.functional.pad((lengths + block_size - 1) // block_size, (0, 1))
    start, key_start = begins[sequence] + within * query_block, begins[key_sequence] + block * block_size
    start, key_start = torch.minimum(start, ends[sequence]), torch.minimum(key_start, ends[key_sequence])
    place = torch.arange(t, device=device)
    mine = torch.searchsorted(bounds, place, right=True) - 1
    return Tables(
        start,
        torch.minimum(start + query_block, ends[sequence]),
        (counts.cumsum(0) - counts)[sequence],
        counts[sequence],
        key_start,
        torch.minimum(key_start + block_size, ends[key_sequence]),
        block * block_size,
        (place - bounds[mine])[None],
    )


def _numbered(counts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence that each of the numbered parts belongs to, and its number within it; len(counts) past the end."""
    ends = counts.cumsum(0)
    sequence = torch.searchsorted(ends, index, right=True)
    return sequence, index - torch.nn.functional.pad(ends, (1, 0))[sequence]


def distinct(blocks: Tensor) -> Tensor:
    """The lists in ascending order, int64; what names no block, and all but one mention of a block, becomes -1."""
    highest = torch.iinfo(torch.int64).max
    ordered = torch.where(blocks < 0, highest, blocks.long()).sort(-1).values
    again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return torch.where(again | (ordered == highest), -1, ordered)
