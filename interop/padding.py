"""Batches with padding or with several sequences in a row, and the same batches packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedShape


class Rows:
    """Rows of which some columns are padding, or which hold several sequences, and the same rows packed.

    Attributes:
        shape: (b, t) of the rows.
        place: which of their b · t columns are packed; None where the rows are left unchanged.
        cu_seqlens: offsets of the packed sequences; None where each row is one sequence without padding.
        positions: of the tokens that remain, (1, tokens) or (b, t); None where they count from the sequence's start.
    """

    def __init__(
        self, shape: tuple[int, int], place: Tensor | None, cu_seqlens: Tensor | None, positions: Tensor | None
    ):
        self.shape, self.place, self.cu_seqlens, self.positions = shape, place, cu_seqlens, positions

    @staticmethod
    def of(x: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Rows:
        """The rows of `x` (b, t, d).

        Args:
            x: with one entry for each column.
            mask: (b, s), 0 at padding; the last t columns count.
            position_ids: (b, t) or (1, t). Where they do not ascend from a token to the next, a sequence ends.

        Raises:
            UnsupportedShape: shapes that do not fit, or a row that is padding only.
        """
        shape = (x.shape[0], x.shape[1])
        kept = _kept(mask, shape)
        starts = None if position_ids is None else _starts(position_ids, shape, kept)
        if kept is None and starts is None:
            return Rows(shape, None, None, None if position_ids is None else position_ids.expand(shape))
        kept = torch.ones(shape, dtype=torch.bool) if kept is None else kept.cpu()
        lengths = kept.sum(1).tolist()
        if shape[1] and not min(lengths):
            raise UnsupportedShape(
                f"attention_mask: row {lengths.index(0)} has no token among the last {shape[1]} columns; leave the "
                "row out, or read it in one piece"
            )
        first = torch.zeros(shape, dtype=torch.bool) if starts is None else starts.cpu()
        # The first token that a row keeps begins a sequence too.
        first |= kept & (kept.cumsum(1) == 1)
        begins = first.flatten()[kept.flatten()].nonzero()[:, 0]
        place = kept.flatten().nonzero()[:, 0].to(x.device)
        positions = None if position_ids is None else position_ids.expand(shape).reshape(-1)[place][None]
        return Rows(shape, place, F.pad(begins, (0, 1), value=len(place)).to(x.device), positions)

    @property
    def several(self) -> bool:
        """Whether a row holds more than one sequence."""
        return self.cu_seqlens is not None and len(self.cu_seqlens) - 1 > self.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """(b, t, ...) as (1, tokens, ...), or unchanged where nothing is packed."""
        return x if self.place is None else x.flatten(0, 1)[self.place][None]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, zero at padding."""
        if self.place is None:
            return x
        whole = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return whole.index_copy(0, self.place, x[0]).unflatten(0, self.shape)


def _kept(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Which columns are no padding, (b, t); None where none is."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise UnsupportedShape(
            f"attention_mask: shape {tuple(mask.shape)} is not (batch, time) with {shape[0]} rows and at least "
            f"{shape[1]} columns"
        )
    kept = mask[:, mask.shape[1] - shape[1] :] != 0
    return None if kept.all() else kept


def _starts(position_ids: Tensor, shape: tuple[int, int], kept: Tensor | None) -> Tensor | None:
    """Which tokens begin a sequence within their row, (b, t); None where every row is one sequence."""
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
        raise UnsupportedShape(f"position_ids: shape {tuple(position_ids.shape)} is not (batch, time), {shape}")
    if not shape[1]:
        return None
    ids = position_ids.expand(shape).long()
    if kept is not None:
        # Padding has a position too; a token follows the last one before it that is none.
        column = torch.arange(shape[1], device=ids.device)
        last = torch.where(kept.to(ids.device), column, -1).cummax(1).values
        before = F.pad(last[:, :-1], (1, 0), value=-1)
        previous = torch.where(before < 0, -1, ids.gather(1, before.clamp(min=0)))
        starts = kept.to(ids.device) & (before >= 0) & (ids <= previous)
    else:
        starts = F.pad(ids[:, 1:] <= ids[:, :-1], (1, 0))
    return starts if starts.any() else None
