"""Shorter training sequences at the beginning of a run (sequence length warm-up, arXiv 2108.06084)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

START = 32


def length_at(step: int, growing: int, longest: int) -> int:
    """The most tokens of a sequence at `step`: `START`, doubled at equal distances over the first `growing` steps.

    The doublings are those that lead to `longest`; past them sequences are not cut.
    """
    if step >= growing:
        return longest
    doublings = max(1, (longest // START - 1).bit_length())
    return START << (step * doublings // growing)


def longest_sequence(batch: dict[str, Any]) -> int:
    """The tokens of the longest sequence of a batch, those that fill up its row included."""
    borders = batch.get("cu_seqlens")
    return batch["tokens"].shape[1] if borders is None else int(borders.diff().max())


def cut(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """The same tokens as sequences of at most `length`: packed ones get more borders, rows become more rows.

    What is left over at the end of a row, where `length` does not divide it, is dropped.
    """
    if longest_sequence(batch) <= length:
        return batch
    if batch.get("cu_seqlens") is not None:
        borders = batch["cu_seqlens"].tolist()
        starts = [at for a, b in pairwise(borders) for at in range(a, b, length)]
        return batch | {"cu_seqlens": batch["cu_seqlens"].new_tensor([*starts, borders[-1]])}
    parts = batch["tokens"].shape[1] // length
    rows = {
        name: batch[name][:, : parts * length].reshape(-1, length)
        for name in ("tokens", "counted")
        if batch.get(name) is not None
    }
    if batch.get("lengths") is None:
        return batch | rows
    starts = torch.arange(parts, device=batch["lengths"].device) * length
    lengths = (batch["lengths"][:, None] - starts).clamp(0, length).flatten()
    # A sequence of one token has nothing to be scored.
    kept = lengths > 1
    return batch | {name: value[kept] for name, value in (rows | {"lengths": lengths}).items()}
