"""What the tokens of a batch are: their order in time, their boundaries, their place on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ConfigError, UnsupportedShape
from ..utils.private_torch import pytree

Grid = tuple[int, int, int]


class Immutable:
    """Objects whose attributes are set once, by their constructor through `_set`.

    They are no dataclasses: Lightning and FSDP2 rebuild the dataclasses that they find in a call's arguments field by
    field, which frozen ones refuse.
    """

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one instead of setting {name!r}")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Immutable:
        """The same with its tensors on a device; Lightning and Fabric move what they find in a batch by this."""
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=non_blocking), self)


class Layout(Immutable):
    """Built once per batch and shared by all layers; a pytree, of which everything but tensors is static.

    Args:
        causal: True, a token sees itself and earlier ones; False, all of its sequence; "block", its own block and
            earlier ones.
        cu_seqlens: offsets of packed sequences, batch 1: 0, then the running total of their lengths; `(n + 1,)`, int32
            or int64. Sequences may be empty.
        grid: (t, h, w), the tokens in raster order; None where they have no such place. Of packed sequences one for
            each: a tuple of such triples.
        extra: indices in the sequence of tokens that are not on the grid (class token, registers), ascending. The
            sequence then has t · h · w + len(extra) tokens. Of packed sequences, all such tokens by their indices in
            the row.
        block: with `causal="block"`, tokens per block, or the number of each token's block, `(b, t)` int64, which never
            descends along a sequence. Blocks of a fixed size count from the start of each sequence or, with a state,
            from where it resumes, which is a boundary. A sequence whose length is no multiple of `block` ends in a
            shorter block; what resumes after it takes its end for a boundary, and so pieces equal the whole only where
            all but the last consist of whole blocks.
        rows: whether the grid's cells stand in true rows and columns. False for merged tokens, of which only the order
            within a time step means something; scan orders that follow rows or columns are then refused.

    Attributes:
        grids: the grid of each packed sequence, or the one that all rows have; () where there is none.

    Raises:
        ConfigError: values that do not go together, with the argument's name.
    """

    causal: bool | Literal["block"]
    cu_seqlens: Tensor | None
    grid: Grid | tuple[Grid, ...] | None
    grids: tuple[Grid, ...] = ()
    extra: tuple[int, ...]
    block: int | Tensor | None
    rows: bool

    def __init__(
        self,
        *,
        causal: bool | Literal["block"] = True,
        cu_seqlens: Tensor | None = None,
        grid: Grid | Sequence[Grid] | None = None,
        extra: tuple[int, ...] = (),
        block: int | Tensor | None = None,
        rows: bool = True,
    ):
        # 1 and numpy's True are equal to True, but not it, which is what layers ask for.
        if not isinstance(causal, bool) and not (isinstance(causal, str) and causal == "block"):
            raise ConfigError(f"causal is {causal!r}; it must be True, False or 'block'")
        if (causal == "block") != (block is not None):
            raise ConfigError(f"block is {block!r} with causal={causal!r}; they go together")
        if block is not None and not isinstance(block, Tensor) and (not _whole(block) or block < 1):
            raise ConfigError(f"block is {block!r}; it must be an integer of at least 1, or a tensor of block numbers")
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise ConfigError(f"cu_seqlens is {cu_seqlens!r}; it must be a tensor of int32 or int64")
        if grid is not None:
            grids = _checked_grids(grid, cu_seqlens)
            grid = grids[0] if cu_seqlens is None else grids
            self._set(grids=grids)
        self._set(causal=causal, cu_seqlens=cu_seqlens, grid=grid, extra=extra, block=block, rows=rows)
        if extra:
            self._check_extra()
        if isinstance(block, Tensor):
            self._check_numbers(block)

    def _check_numbers(self, block: Tensor) -> None:
        if block.ndim != 2 or block.dtype != torch.int64:
            raise ConfigError(
                f"block is a {block.dtype} tensor of shape {tuple(block.shape)}; it must be int64, (b, t)"
            )
        # What is traced, or has no values, is not looked at.
        if torch.compiler.is_compiling() or type(block) is not Tensor or block.is_meta:
            return
        descends = block.diff(dim=1) < 0
        if self.cu_seqlens is not None and descends.numel():
            first = self.cu_seqlens[1:-1].long()
            descends[:, first[(first > 0) & (first < block.shape[1])] - 1] = False
        if descends.any():
            row, place = descends.nonzero()[0].tolist()
            raise ConfigError(
                f"block: the numbers of row {row} descend from {block[row, place]} to {block[row, place + 1]} at token "
                f"{place + 1}; a token's block is never before that of the token before it"
            )

    def _check_extra(self) -> None:
        extra = self.extra
        if self.grid is None and self.cu_seqlens is None:
            raise ConfigError("extra names tokens that are not on the grid, but grid is None")
        if list(extra) != sorted(set(extra)) or extra[0] < 0:
            raise ConfigError(f"extra is {extra}; it must be ascending indices from 0 on")
        if self.length is not None and extra[-1] >= self.length:
            raise ConfigError(f"extra is {extra}; it must be ascending indices below {self.length}")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("causal", "cu_seqlens", "grid", "extra", "block", "rows")}
        return f"Layout({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def replace(self, **values: Any) -> Layout:
        """A layout with these arguments in place of its own."""
        own = {name: getattr(self, name) for name in ("causal", "cu_seqlens", "grid", "extra", "block", "rows")}
        return Layout(**{**own, **values})

    @property
    def length(self) -> int | None:
        """Tokens a row, where the grid says so."""
        if not self.grids:
            return None
        return sum(prod(grid) for grid in self.grids) + len(self.extra)

    def sequences(self, batch: int) -> int:
        """How many sequences, and so states, a batch of `batch` rows holds."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def check(self, x: Tensor) -> None:
        """Raise UnsupportedShape where `x` (b, t, d) does not fit this layout."""
        if self.cu_seqlens is not None and x.shape[0] != 1:
            raise UnsupportedShape(f"layout.cu_seqlens: packed sequences need batch 1, and x has {x.shape[0]} rows")
        if self.length is not None and x.shape[1] != self.length:
            raise UnsupportedShape(
                f"x has {x.shape[1]} tokens, but layout.grid {self.grid} with {len(self.extra)} extra tokens "
                f"says {self.length}"
            )
        if isinstance(self.block, Tensor) and self.block.shape != x.shape[:2]:
            raise UnsupportedShape(f"layout.block: shape {tuple(self.block.shape)} is not {tuple(x.shape[:2])}, x's")

    def to_grid(self, x: Tensor) -> Tensor:
        """Tokens (b, t · h · w, d) as images (b · t, d, h, w), without a copy: memory stays channels last.

        Raises:
            UnsupportedShape: no grid, or tokens that are not on it.
        """
        if self.grid is None or self.extra or self.cu_seqlens is not None:
            raise UnsupportedShape(f"{self!r} is no plain grid; its tokens cannot be seen as images")
        _, h, w = self.grids[0]
        return x.reshape(-1, h, w, x.shape[-1]).permute(0, 3, 1, 2)

    def sequence_of(self, x: Tensor) -> Int[Tensor, "b t"]:
        """The sequence that each token of `x` (b, t, ...) belongs to."""
        b, t = x.shape[:2]
        if self.cu_seqlens is None:
            return torch.arange(b, device=x.device)[:, None].expand(b, t)
        place = torch.arange(t, device=x.device)
        return (torch.searchsorted(self.cu_seqlens.long(), place, right=True) - 1)[None]

    def positions(self, x: Tensor, start: Int[Tensor, " n"] | None = None) -> Int[Tensor, "b t"]:
        """Each token's index in its sequence, counted from 0 or from its sequence's `start`."""
        place = torch.arange(x.shape[1], device=x.device)
        if self.cu_seqlens is None:
            place = place.expand(x.shape[:2])
            return place if start is None else place + start[:, None]
        sequence = self.sequence_of(x)[0]
        place = place - self.cu_seqlens.long()[sequence]
        return (place if start is None else place + start[sequence])[None]

    def lengths(self, x: Tensor) -> Int[Tensor, " n"]:
        """Tokens in each sequence of `x` (b, t, ...)."""
        if self.cu_seqlens is None:
            return torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self.cu_seqlens.long().diff()

    def block_ends(self, x: Tensor) -> Int[Tensor, "b t"]:
        """The index in its sequence, from 0, of the last token in each token's block."""
        place, block = self.positions(x), self.block
        if block is None or isinstance(block, Tensor):
            boundaries = self.block_boundaries(x).long()
            last = (boundaries[1:] - 1).repeat_interleave(boundaries.diff(), output_size=place.numel())
            return place.reshape(-1)[last].view_as(place)
        last = x.shape[1] - 1
        if self.cu_seqlens is not None:
            last = (self.lengths(x) - 1).repeat_interleave(self.lengths(x), output_size=x.shape[1])
        ends = place - place % block + block - 1
        return ends.clamp(max=last) if isinstance(last, int) else torch.minimum(ends, last)

    def block_boundaries(self, x: Tensor) -> Int[Tensor, " n_plus_1"]:
        """Offsets of the blocks in all tokens of `x`, (b · t) of them, sequence after sequence."""
        place = self.positions(x).reshape(-1)
        first = place % self.block == 0 if isinstance(self.block, int) else place == 0
        if isinstance(self.block, Tensor):
            number = self.block.reshape(-1)
            first = first | torch.cat([first.new_ones(min(1, len(number))), number[1:] != number[:-1]])
        starts = first.nonzero()[:, 0]
        return torch.cat([starts, starts.new_tensor([place.numel()])])

    @staticmethod
    def pack(x: Tensor, lengths: Int[Tensor, " n"], *, causal: bool = True) -> tuple[Tensor, Layout]:
        """Rows of `x` (n, t, ...), filled up at their ends, as one row without the fill, and its layout."""
        return pack_rows(x, lengths), Layout(causal=causal, cu_seqlens=offsets(lengths))


# Traced sizes are integers too.
_INTEGERS = (int, torch.SymInt)


def _whole(number: Any) -> bool:
    return isinstance(number, _INTEGERS) and not isinstance(number, bool)


def _checked_grids(grid: Any, cu_seqlens: Tensor | None) -> tuple[Grid, ...]:
    several = len(grid) > 0 and isinstance(grid[0], tuple | list)
    grids: tuple[Any, ...] = tuple(tuple(one) for one in grid) if several else (tuple(grid),)
    if any(len(one) != 3 or not all(map(_whole, one)) or min(one) < 1 for one in grids):
        raise ConfigError(f"grid is {grid!r}; it must be (t, h, w), each an integer of at least 1")
    if several != (cu_seqlens is not None):
        raise ConfigError(
            f"grid is {grid!r}; packed sequences (cu_seqlens) have one (t, h, w) each, and others a single one"
        )
    if cu_seqlens is not None and len(grids) != cu_seqlens.shape[0] - 1:
        raise ConfigError(f"grid holds {len(grids)} triples, and cu_seqlens {cu_seqlens.shape[0] - 1} sequences")
    return grids


def offsets(lengths: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    """`cu_seqlens` of sequences of these lengths."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def pack_rows(x: Tensor, lengths: Int[Tensor, " n"]) -> Tensor:
    """The first `lengths` tokens of each row of `x` (n, t, ...), concatenated: (1, sum, ...)."""
    return x[torch.arange(x.shape[1], device=x.device) < lengths[:, None]][None]


def unpack(x: Tensor, cu_seqlens: Int[Tensor, " n_plus_1"], fill: int = 0) -> Tensor:
    """Packed `x` (1, t, ...) as one row a sequence, `(n, longest, ...)`, filled up at the end with `fill`."""
    rows = list(x[0].split(cu_seqlens.diff().tolist()))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def repack(x: Tensor, cu_seqlens: Int[Tensor, " n_plus_1"]) -> Tensor:
    """The inverse of `unpack`."""
    return torch.cat([row[:length] for row, length in zip(x, cu_seqlens.diff().tolist(), strict=True)])[None]


def _flatten(layout: Layout) -> tuple[list[Any], tuple[Any, ...]]:
    fixed = layout.block if isinstance(layout.block, int) else None
    numbers = layout.block if isinstance(layout.block, Tensor) else None
    return [layout.cu_seqlens, numbers], (layout.causal, layout.grid, layout.grids, layout.extra, layout.rows, fixed)


def _unflatten(tensors: Any, static: tuple[Any, ...]) -> Layout:
    # Transforms of pytrees put other things than tensors into the leaves for a while, so that nothing is checked here.
    cu_seqlens, numbers = tensors
    causal, grid, grids, extra, rows, fixed = static
    layout = Layout.__new__(Layout)
    block = numbers if fixed is None else fixed
    layout._set(causal=causal, cu_seqlens=cu_seqlens, grid=grid, grids=grids, extra=extra, rows=rows, block=block)
    return layout


def _flatten_with_keys(layout: Layout) -> tuple[list[tuple[Any, Any]], Any]:
    tensors, static = _flatten(layout)
    return list(zip(map(pytree.GetAttrKey, ("cu_seqlens", "block")), tensors, strict=True)), static


pytree.register_pytree_node(
    Layout,
    _flatten,
    _unflatten,
    serialized_type_name="omnimix.Layout",
    flatten_with_keys_fn=_flatten_with_keys,
)
