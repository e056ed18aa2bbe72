"""What the tokens of a batch are: their order in time, their borders, their place on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ConfigError, UnsupportedShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Built once per batch and shared by all layers.

    Args:
        causal: True, a token sees itself and what came before; False, all of its sequence; "block", its own block of
            `block` tokens and what came before.
        cu_seqlens: packed sequences, batch 1: 0, then the running total of their lengths; `(n + 1,)`, int32 or int64.
        grid: (t, h, w), the tokens in raster order; None where they have no such place.
        extra: positions in the sequence of tokens that are not on the grid (class token, registers), ascending. The
            sequence then has t · h · w + len(extra) tokens. Of packed sequences, which have no grid, all such tokens by
            their positions in the row.
        block: tokens per block, where `causal="block"`. Blocks count from the start of each sequence or, with a state,
            from where it goes on, which is a border. A sequence whose length is no multiple of `block` ends in a
            shorter block; what goes on from the state after it takes its end for a border, and so pieces equal the
            whole only where all but the last consist of whole blocks.
        rows: whether the grid's cells stand in true rows and columns. False for merged tokens, of which only the order
            within a time step means something; scan orders that follow rows or columns are then refused.
    """

    causal: bool | Literal["block"] = True
    cu_seqlens: Tensor | None = None
    grid: tuple[int, int, int] | None = None
    extra: tuple[int, ...] = ()
    block: int | None = None
    rows: bool = True

    def __post_init__(self) -> None:
        if self.causal not in (True, False, "block"):
            raise ConfigError(f"causal is {self.causal!r}; it must be True, False or 'block'")
        if (self.causal == "block") != (self.block is not None):
            raise ConfigError(f"block is {self.block!r} with causal={self.causal!r}; they go together")
        if self.block is not None and self.block < 1:
            raise ConfigError(f"block is {self.block}; it must be at least 1")
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ConfigError(f"grid is {self.grid!r}; it must be (t, h, w), each at least 1")
        if self.extra and self.grid is None and self.cu_seqlens is None:
            raise ConfigError("extra names tokens beside a grid, but grid is None")
        if self.extra and (list(self.extra) != sorted(set(self.extra)) or self.extra[0] < 0):
            raise ConfigError(f"extra is {self.extra}; it must be ascending positions from 0 on")
        if self.extra and self.grid is not None and self.extra[-1] >= self.length:
            raise ConfigError(f"extra is {self.extra}; it must be ascending positions below {self.length}")

    @property
    def length(self) -> int | None:
        """Tokens a sequence, where the grid says so."""
        return None if self.grid is None else prod(self.grid) + len(self.extra)

    def sequences(self, batch: int) -> int:
        """How many sequences, and so states, a batch of `batch` rows holds."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def check(self, x: Tensor) -> None:
        """Raise UnsupportedShape where `x` (b, t, d) does not fit this layout."""
        if self.cu_seqlens is not None and x.shape[0] != 1:
            raise UnsupportedShape(f"layout.cu_seqlens: packed sequences need batch 1, and x has {x.shape[0]} rows")
        if self.length is not None and self.cu_seqlens is None and x.shape[1] != self.length:
            raise UnsupportedShape(
                f"x has {x.shape[1]} tokens, but layout.grid {self.grid} with {len(self.extra)} extra tokens "
                f"says {self.length}"
            )

    def positions(self, x: Tensor, start: Int[Tensor, "n"] | None = None) -> Int[Tensor, "b t"]:
        """Each token's place in its sequence, from 0 or from its sequence's `start`."""
        place = torch.arange(x.shape[1], device=x.device)
        if self.cu_seqlens is None:
            place = place.expand(x.shape[:2])
            return place if start is None else place + start[:, None]
        cu_seqlens = self.cu_seqlens.long()
        sequence = torch.searchsorted(cu_seqlens, place, right=True) - 1
        place = place - cu_seqlens[sequence]
        return (place if start is None else place + start[sequence])[None]

    def block_ends(self, x: Tensor) -> Int[Tensor, "b t"]:
        """The place in its sequence, from 0, of the last token in each token's block."""
        place, last = self.positions(x), x.shape[1] - 1
        if self.cu_seqlens is not None:
            last = (self.lengths(x) - 1).repeat_interleave(self.lengths(x), output_size=x.shape[1])
        ends = place - place % self.block + self.block - 1
        return ends.clamp(max=last) if isinstance(last, int) else torch.minimum(ends, last)

    def block_borders(self, x: Tensor) -> Int[Tensor, "n_plus_1"]:
        """`cu_seqlens` of the blocks of packed sequences."""
        starts = (self.positions(x)[0] % self.block == 0).nonzero()[:, 0]
        return torch.cat([starts, starts.new_tensor([x.shape[1]])]).to(self.cu_seqlens.dtype)

    def lengths(self, x: Tensor) -> Int[Tensor, "n"]:
        """Tokens in each sequence of `x` (b, t, ...)."""
        if self.cu_seqlens is None:
            return torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self.cu_seqlens.long().diff()


def unpack(x: Tensor, cu_seqlens: Int[Tensor, "n_plus_1"], fill: int = 0) -> Tensor:
    """Packed `x` (1, t, ...) as one row a sequence, `(n, longest, ...)`, filled up at the end with `fill`."""
    rows = x[0].split(cu_seqlens.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def repack(x: Tensor, cu_seqlens: Int[Tensor, "n_plus_1"]) -> Tensor:
    """The inverse of `unpack`."""
    return torch.cat([row[:length] for row, length in zip(x, cu_seqlens.diff().tolist(), strict=True)])[None]
