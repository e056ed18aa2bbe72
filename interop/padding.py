"""Batches with padding, and the same batches packed."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..errors import UnsupportedShape


class Rows:
    """Rows of which some columns are padding, and the same rows packed without it."""

    def __init__(self, shape: tuple[int, int], place: Tensor | None, cu_seqlens: Tensor | None):
        self.shape, self.place, self.cu_seqlens = shape, place, cu_seqlens

    @staticmethod
    def of(x: Tensor, mask: Tensor | None) -> Rows:
        """The rows of `x` (b, t, d) under `mask` (b, s), whose last t columns count."""
        shape = (x.shape[0], x.shape[1])
        if mask is None:
            return Rows(shape, None, None)
        if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise UnsupportedShape(
                f"attention_mask: shape {tuple(mask.shape)} is not (batch, time) with {shape[0]} rows and at least "
                f"{shape[1]} columns"
            )
        mask = mask[:, -shape[1] :] != 0
        if mask.all():
            return Rows(shape, None, None)
        lengths = mask.sum(1).tolist()
        if not min(lengths):
            raise UnsupportedShape(
                f"attention_mask: row {lengths.index(0)} has no token among the last {shape[1]} columns; leave the "
                "row out, or read it in one piece"
            )
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=x.device)
        return Rows(shape, mask.flatten().nonzero()[:, 0].to(x.device), cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """(b, t, ...) as (1, tokens, ...), or as it is where nothing is padding."""
        return x if self.place is None else x.flatten(0, 1)[self.place][None]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, zero at padding."""
        if self.place is None:
            return x
        whole = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return whole.index_copy(0, self.place, x[0]).unflatten(0, self.shape)
