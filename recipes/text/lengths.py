"""Shorter training sequences at the beginning of a run (sequence length warm-up, arXiv 2108.06084)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

START = 32


def length_at(step: int, growing: int, longest: int) -> int:
    """The most scored tokens of a sequence at `step`: `START`, doubled over the first `growing` steps.

    The doublings are those that lead to `longest`; past them sequences are not cut.
    """
    if step >= growing:
        return longest
    doublings = max(1, (longest // START - 1).bit_length())
    return START << (step * doublings // growing)


def scored(batch: dict[str, Any]) -> int:
    """The tokens after the first of the longest sequence of a batch, those that fill up its row included."""
    bounds = batch.get("cu_seqlens")
    return (batch["tokens"].shape[1] if bounds is None else int(bounds.diff().max())) - 1


def cut(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """The same tokens as sequences of `length` after a first one: packed ones get more boundaries, rows become more.

    Rows begin with the token that the one before ended with. What is left over after the last whole one is dropped,
    unless nothing would then be scored: such a batch stays as it is.
    """
    if scored(batch) <= length:
        return batch
    if batch.get("cu_seqlens") is not None:
        bounds = batch["cu_seqlens"].tolist()
        starts = [at for a, b in pairwise(bounds) for at in range(a, b, length + 1)]
        return batch | {"cu_seqlens": batch["cu_seqlens"].new_tensor([*starts, bounds[-1]])}
    rows = {
        name: batch[name].unfold(1, length + 1, length).flatten(0, 1)
        for name in ("tokens", "counted")
        if batch.get(name) is not None
    }
    if "counted" in rows and not rows["counted"][:, 1:].any():
        return batch
    if batch.get("lengths") is None:
        return batch | rows
    starts = torch.arange(len(rows["tokens"]) // len(batch["lengths"]), device=batch["lengths"].device) * length
    lengths = (batch["lengths"][:, None] - starts).clamp(0, length + 1).flatten()
    # A sequence of one token has nothing to be scored.
    kept = lengths > 1
    return batch | {name: value[kept] for name, value in (rows | {"lengths": lengths}).items()}
