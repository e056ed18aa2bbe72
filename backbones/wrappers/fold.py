"""Groups of grid cells as sequences of their own: windows, rows, columns, frames, and the same place over time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError, UnsupportedCall
from ...utils.modes import constant_in_graphs, outliving_modes
from ..config import MixerConfig, Site, configured
from ..context import Context
from ..layer import Capabilities, Output, SequenceLayer
from ..layout import Grid, Layout, offsets
from ..registry import build_part
from ..state import State
from .base import WrapperConfig, register_wrapper


@dataclass(frozen=True, kw_only=True)
class FoldConfig(WrapperConfig):
    """Options of `fold`.

    Args:
        inner: the mixer that runs within each group: its configuration or name.
        groups: "windows" of each frame (Swin), its "rows" or "columns" (axial), whole "frames", or the cells at one
            place over "time" (TimeSformer).
        window: height and width of a window; windows at the edge may be smaller.
        shift: by how much windows are moved down and right, so that layers by turns see across their edges; the cells
            before the first window form smaller ones.
    """

    inner: MixerConfig | str
    groups: Literal["windows", "rows", "columns", "frames", "time"] = "windows"
    window: tuple[int, int] = (7, 7)
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if min(self.window) < 1:
            raise ConfigError(f"FoldConfig.window is {self.window}; it must be (height, width), each at least 1")
        if not all(0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise ConfigError(f"FoldConfig.shift is {self.shift}; it must be from 0 on and below window, {self.window}")
        object.__setattr__(self, "inner", configured(MixerConfig, self.inner))


@register_wrapper(
    "fold",
    FoldConfig,
    summary="windows, rows, columns, frames or places over time as sequences of their own",
    source="arXiv 2103.14030, 1912.12180, 2102.05095",
    examples=(),
)
class Fold(SequenceLayer):
    """The inner mixer within each group of the grid's cells, in raster order. Other tokens are refused."""

    def __init__(self, dim: int, config: FoldConfig, site: Site):
        super().__init__()
        self.config = config
        # Its cells have a context of their own, without what others share.
        self.inner = build_part(config.inner, dim, dataclasses.replace(site, written=frozenset()))
        if unserved := sorted(self.inner.capabilities.reads - {"positions"}):
            raise ConfigError(
                f"FoldConfig.inner, {type(self.inner).__name__}, reads {unserved[0]!r}, which groups of cells do "
                "not have; put it into a block of its own"
            )
        if not self.inner.capabilities.bidirectional:
            raise UnsupportedCall(
                f"{type(self.inner).__name__} is causal, and the cells of a group see each other; configure "
                "scan='bidirectional' or another set of orders"
            )
        inner = self.inner.capabilities
        self.capabilities = Capabilities(
            causal=False,
            blockwise=False,
            streaming=False,
            packed=inner.packed,
            rows_independent=inner.rows_independent,
            needs_grid=True,
            receptive_field=None,
        )

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context = Context.of(context)
        layout = context.layout
        if layout.causal or layout.grid is None or layout.extra or not layout.rows or state is not None:
            raise UnsupportedCall(
                f"fold needs Layout(causal=False, grid=...) with rows and without extra tokens, not {layout!r}"
            )
        config = self.config
        index, inverse, lengths = _groups(layout.grids, config.groups, config.window, config.shift)
        index, inverse = index.to(x.device), inverse.to(x.device)
        folded, size = x.index_select(1, index), lengths[0]
        if all(length == size for length in lengths):
            inner = Context(Layout(causal=False))
            out = self.inner(folded.reshape(-1, size, x.shape[-1]), inner)
        else:
            # Groups of different sizes are packed sequences, row after row of the batch.
            boundaries = offsets(torch.tensor(lengths, device=x.device).repeat(x.shape[0]))
            out = self.inner(folded.reshape(1, -1, x.shape[-1]), Context(Layout(causal=False, cu_seqlens=boundaries)))
        return Output(out.y.reshape(x.shape).index_select(1, inverse), losses=out.losses)


@constant_in_graphs
def _groups(
    grids: tuple[Grid, ...], groups: str, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Cells group by group (an index into the row and its inverse, int64 on the CPU), and the groups' sizes."""
    return _groups_once(grids, groups, window, shift)


@lru_cache(maxsize=256)
def _groups_once(
    grids: tuple[Grid, ...], groups: str, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    with outliving_modes():
        parts, start = [], 0
        for t, h, w in grids:
            cells = torch.arange(start, start + t * h * w).view(t, h, w)
            parts += _parts(cells, groups, window, shift)
            start += t * h * w
        index = torch.cat(parts)
        return index, torch.argsort(index), tuple(len(part) for part in parts)


def _parts(cells: Tensor, groups: str, window: tuple[int, int], shift: tuple[int, int]) -> list[Tensor]:
    if groups == "rows":
        return list(cells.flatten(0, 1))
    if groups == "columns":
        return list(cells.transpose(1, 2).flatten(0, 1))
    if groups == "time":
        return list(cells.flatten(1).t())
    if groups == "frames":
        return list(cells.flatten(1))
    bands, strips = ([s, size] for s, size in zip(shift, window, strict=True))
    found = []
    for frame in cells:
        for band in _cut(frame, bands, 0):
            found += [part.reshape(-1) for part in _cut(band, strips, 1)]
    return found


def _cut(cells: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    """The first `sizes[0]` rows or columns, if any, then pieces of `sizes[1]`."""
    first, size = sizes
    head, rest = cells.split([first, cells.shape[dim] - first], dim) if first < cells.shape[dim] else (cells, None)
    pieces = [head] if head.numel() else []
    return pieces if rest is None else pieces + list(rest.split(size, dim))
