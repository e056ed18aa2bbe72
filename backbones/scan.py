"""Directions and scan orders: index permutations of the tokens, with exact inverses.

A mixer with a causal kernel covers a whole image or video by running over it in several orders. Each order is a
permutation of the sequence: tokens of the grid are visited in another order, other tokens (class token, registers)
stay where they are; `-reverse` then reverses the whole sequence. Packed sequences are permuted each by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ConfigError, UnknownName, UnsupportedCall
from ..utils.modes import constant_in_graphs, outliving_modes
from ..utils.renamed import warn_renamed
from .context import Context
from .layout import Layout
from .state import State

# Named sets of orders, as the published models use them.
SCANS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "bidirectional": ("forward", "backward"),  # Vim, ViG, VideoMamba (spatial first)
    "cross": ("forward", "backward", "columns", "columns-reverse"),  # VMamba
    "snake": ("snake", "snake-reverse", "snake-columns", "snake-columns-reverse"),  # PlainMamba
    "window": ("window", "window-reverse"),  # LocalMamba
    "hilbert": ("hilbert", "hilbert-reverse"),
    "temporal-first": ("temporal", "temporal-reverse"),
    # Spatial first and temporal first (VideoMamba, arXiv 2403.06977, figure 3).
    "cross-3d": ("forward", "backward", "temporal", "temporal-reverse"),
}
# Old names of sets, which work for one release.
RENAMED = {"both": "bidirectional"}
ORDERS = ("forward", "columns", "snake", "snake-columns", "window", "hilbert", "temporal")
WINDOW = 2  # side of LocalMamba's windows


def scan_orders(scan: str) -> tuple[str, ...]:
    """The orders of a named set, or of several orders joined by commas.

    Raises:
        UnknownName: neither a set nor an order.
    """
    if scan in SCANS:
        return SCANS[scan]
    orders = tuple(part.strip() for part in scan.split(","))
    known = [*ORDERS, "backward", *(f"{order}-reverse" for order in ORDERS)]
    for order in orders:
        if order not in known:
            raise UnknownName("scan", order, {*SCANS, *known})
    if len(set(orders)) != len(orders):
        raise ConfigError(f"scan is {scan!r}; an order stands in it twice")
    return orders


def with_current_scan(values: dict[str, Any]) -> dict[str, Any]:
    """Stored values of a configuration, with the current name of their set of orders."""
    scan = values.get("scan")
    return values | {"scan": RENAMED[scan]} if isinstance(scan, str) and scan in RENAMED else values


def rename_scan(config: Any) -> None:
    """Give a configuration the current name of its set of orders, with a FutureWarning for an old one."""
    if config.scan in RENAMED:
        warn_renamed(f"scan={config.scan!r}", f"scan={RENAMED[config.scan]!r}", level=5)
        object.__setattr__(config, "scan", RENAMED[config.scan])


def needs_rows(order: str) -> bool:
    """Whether an order follows the rows or columns of a frame."""
    return order.removesuffix("-reverse") not in ("forward", "backward", "temporal")


def permute(x: Tensor, order: str, layout: Layout) -> Tensor:
    """`x` (b, t, ...) with its tokens in the given order."""
    return _apply(x, order, layout, inverse=False)


def restore(x: Tensor, order: str, layout: Layout) -> Tensor:
    """The inverse of `permute`."""
    return _apply(x, order, layout, inverse=True)


def within_blocks(
    branch: Callable[..., tuple[tuple[Tensor, ...], State | None]], streams: tuple[Tensor, ...], layout: Layout
) -> tuple[Tensor, ...]:
    """What `branch` makes of `streams` (b, t, ...), backwards within each of the layout's blocks."""
    (b, t), parts = streams[0].shape[:2], []
    block = layout.block
    if layout.cu_seqlens is not None or block is None or isinstance(block, Tensor):
        inside = Layout(causal=False, cu_seqlens=layout.block_boundaries(streams[0]))
        rows = (s.reshape(1, b * t, *s.shape[2:]) for s in streams)
        mixed, _ = branch(tuple(permute(s, "backward", inside) for s in rows), Context(inside), None)
        return tuple(restore(part, "backward", inside).reshape(b, t, *part.shape[2:]) for part in mixed)
    whole = t - t % block
    # Blocks become rows: those of full size together, and the rest, if any, which is shorter.
    for start, stop, size in ((0, whole, block), (whole, t, t - whole)):
        if start < stop:
            rows = tuple(s[:, start:stop].unflatten(1, (-1, size)).flatten(0, 1).flip(1) for s in streams)
            mixed, _ = branch(rows, Context(Layout(causal=False)), None)
            parts.append([part.flip(1).unflatten(0, (b, -1)).flatten(1, 2) for part in mixed])
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))


def _apply(x: Tensor, order: str, layout: Layout, *, inverse: bool) -> Tensor:
    if order == "forward":
        return x
    boundaries = layout.cu_seqlens
    if order == "backward":
        return x.flip(1) if boundaries is None else x.index_select(1, _reversed_in_place(boundaries, x.shape[1]))
    if not layout.grids:
        raise UnsupportedCall(
            f"scan order {order!r} needs layout.grid, which is None; only forward and backward do not"
        )
    if not layout.rows and needs_rows(order):
        raise UnsupportedCall(
            f"scan order {order!r} follows rows or columns, and these tokens have none (layout.rows is False); "
            "use forward, backward and temporal orders"
        )
    if boundaries is not None:
        return x.index_select(1, _packed_permutation(order, layout, inverse=inverse).to(x.device))
    index = grid_permutation(order, layout.grids[0], layout.extra)[int(inverse)]
    return x.index_select(1, index.to(x.device))


def _packed_permutation(order: str, layout: Layout, *, inverse: bool) -> Int[Tensor, " t"]:
    """The permutations of packed grids, one after the other."""
    start, parts, extra = 0, [], list(layout.extra)
    for grid in layout.grids:
        own, end = [], start + prod(grid)
        # Tokens that are not on the grid lengthen the sequence in which they stand.
        while extra and extra[0] <= end:
            own.append(extra.pop(0) - start)
            end += 1
        parts.append(grid_permutation(order, grid, tuple(own))[int(inverse)] + start)
        start = end
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _reversed_in_place(cu_seqlens: Int[Tensor, " n_plus_1"], length: int) -> Int[Tensor, " t"]:
    """Index that reverses each packed sequence where it stands; its own inverse."""
    cu_seqlens = cu_seqlens.long()
    position = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
    return cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - position


@constant_in_graphs
def grid_permutation(order: str, grid: tuple[int, int, int], extra: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(index, inverse) on the CPU, int64, of a whole sequence, tokens that are not on the grid included."""
    return _grid_permutation(order, grid, extra)


@lru_cache(maxsize=256)
def _grid_permutation(order: str, grid: tuple[int, int, int], extra: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    base, reverse = (order.removesuffix("-reverse"), order.endswith("-reverse"))
    with outliving_modes():
        visits = _visits(base, *grid)
        index = torch.arange(visits.numel() + len(extra))
        beside = torch.zeros_like(index, dtype=torch.bool)
        beside[list(extra)] = True
        on_grid = index[~beside]
        index[~beside] = on_grid[visits]
        if reverse:
            index = index.flip(0)
        return index, torch.argsort(index)


def _visits(order: str, t: int, h: int, w: int) -> Int[Tensor, " n"]:
    """Raster indices of the grid's cells in the order of their visit."""
    cells = torch.arange(t * h * w).view(t, h, w)
    if order == "columns":
        return cells.transpose(1, 2).reshape(-1)
    if order == "temporal":
        return cells.permute(1, 2, 0).reshape(-1)
    if order == "snake":
        return _snake(cells)
    if order == "snake-columns":
        return _snake(cells.transpose(1, 2))
    if order == "window":
        return _windows(cells)
    if order == "hilbert":
        return torch.cat([frame.reshape(-1)[_hilbert(h, w)] for frame in cells])
    return cells.reshape(-1)


def _snake(cells: Int[Tensor, "t h w"]) -> Int[Tensor, " n"]:
    """Rows alternately left to right and right to left; each frame continues where the last one ended."""
    rows = cells.clone()
    rows[:, 1::2] = rows[:, 1::2].flip(2)
    frames = rows.flatten(1)
    frames[1::2] = frames[1::2].flip(1)
    return frames.reshape(-1)


def _windows(cells: Int[Tensor, "t h w"]) -> Int[Tensor, " n"]:
    """Window by window, raster order inside each; windows at the edge may be smaller (LocalMamba, arXiv 2403.09338)."""
    return torch.cat(
        [
            window.reshape(-1)
            for frame in cells
            for band in frame.split(WINDOW, dim=0)
            for window in band.split(WINDOW, dim=1)
        ]
    )


def _hilbert(h: int, w: int) -> Int[Tensor, " n"]:
    """Raster indices along the Hilbert curve of the enclosing power-of-two square, without its cells outside."""
    bits = max(1, (max(h, w) - 1).bit_length())
    steps = torch.arange(4**bits)
    x, y = torch.zeros_like(steps), torch.zeros_like(steps)
    for level in range(bits):
        pair = steps >> (2 * level)
        right, up = (pair >> 1) & 1, (pair ^ (pair >> 1)) & 1
        # A quadrant on the diagonal is the smaller curve transposed, and mirrored where the curve leaves.
        turn, mirror = up == 0, (up == 0) & (right == 1)
        side = 1 << level
        x, y = torch.where(mirror, side - 1 - x, x), torch.where(mirror, side - 1 - y, y)
        x, y = torch.where(turn, y, x), torch.where(turn, x, y)
        x, y = x + right * side, y + up * side
    inside = (x < w) & (y < h)
    return (y * w + x)[inside]
