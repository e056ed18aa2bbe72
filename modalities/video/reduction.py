"""Token reduction for long videos: average groups of grid cells, or merge similar tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError, UnsupportedShape
from ...utils.modes import own_precision

Grid = tuple[int, int, int]


def average_cells(tokens: Float[Tensor, "b t d"], grid: Grid, group: Grid) -> tuple[Float[Tensor, "b new_t d"], Grid]:
    """Average each group of neighbouring cells; the result is a grid too.

    Groups at the end of an axis that the group's side does not divide are smaller, and are means of what they have.

    Args:
        tokens: of the grid, in raster order, without extra tokens.
        grid: (t, h, w).
        group: time steps, rows and columns of a group.

    Returns:
        The means in raster order, and their grid.

    Raises:
        UnsupportedShape: the tokens are not the grid's.
    """
    _check(tokens, grid)
    cells = tokens.unflatten(1, grid)
    for axis, side in enumerate(group, start=1):
        whole = cells.shape[axis] - cells.shape[axis] % side
        full, rest = cells.split([whole, cells.shape[axis] - whole], dim=axis)
        parts = [full.unflatten(axis, (-1, side)).mean(axis + 1)] if whole else []
        parts += [rest.mean(axis, keepdim=True)] if rest.shape[axis] else []
        cells = torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]
    _, t, h, w, _ = cells.shape
    return cells.flatten(1, 3), (t, h, w)


def merge_tokens(
    tokens: Float[Tensor, "b t d"], grid: Grid, keep: int
) -> tuple[Float[Tensor, "b new_t d"], Grid, Int[Tensor, "b new_t"]]:
    """`keep` tokens of every time step, into which the others are merged where they are most alike.

    Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): a step's tokens are divided alternately into two sets;
    each of the first finds the most similar of the second (cosine), and those of the most similar pairs are merged
    into their partner, whose value becomes the mean of all tokens that it stands for. At most half of the tokens go in
    one round, so there are as many rounds as it takes. Time steps are matched apart, so that nothing looks ahead.

    The order is kept, each merged token at its partner's place: spatial-first and temporal-first scans still work.
    Rows and columns are lost: the layout of such tokens is `Layout(grid=..., rows=False)`. The choice is deterministic
    (the first of equals) and has no gradient; the values have one.

    Args:
        tokens: of the grid, in raster order, without extra tokens.
        grid: (t, h, w).
        keep: tokens left of a time step; steps that have no more are left alone.

    Returns:
        The tokens, time step by time step; their grid (t, 1, n); and of how many tokens each is the mean.

    Raises:
        ConfigError: keep < 1.
        UnsupportedShape: the tokens are not the grid's.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}; it must be at least 1")
    _check(tokens, grid)
    steps, cells = grid[0], grid[1] * grid[2]
    rows = tokens.unflatten(1, (steps, cells)).flatten(0, 1)
    # Under autocast too: which tokens are alike must not depend on how a model is run.
    with own_precision(rows.device.type):
        with torch.no_grad():
            groups = _groups(rows.to(torch.promote_types(rows.dtype, torch.float32)), min(keep, cells))
            sizes = groups.sum(-1)
        # As a product with a matrix, whose backward is deterministic everywhere; a scatter's is not.
        merged = (groups / sizes[..., None]).to(rows.dtype) @ rows
    b, n = tokens.shape[0], merged.shape[1]
    merged = merged.unflatten(0, (b, steps)).flatten(1, 2)
    return merged, (steps, 1, n), sizes.long().unflatten(0, (b, steps)).flatten(1, 2)


def _groups(rows: Float[Tensor, "m n d"], keep: int) -> Float[Tensor, "m keep n"]:
    """Which tokens each of those that are kept stands for, as ones and zeros."""
    n = rows.shape[1]
    target = torch.arange(n, device=rows.device).expand(rows.shape[0], n)
    groups = F.one_hot(target, n).to(rows.dtype).mT
    while groups.shape[1] > keep:
        means = F.normalize((groups @ rows) / groups.sum(-1, keepdim=True), dim=-1)
        number = min(means.shape[1] - keep, (means.shape[1] + 1) // 2)
        target = _one_round(means, number).gather(1, target)
        groups = F.one_hot(target, means.shape[1] - number).to(rows.dtype).mT
    return groups


def _one_round(means: Float[Tensor, "m n d"], number: int) -> Int[Tensor, "m n"]:
    """Where each token is after `number` of the first set have been merged into the second."""
    first, second = means[:, ::2], means[:, 1::2]
    best, partner = (first @ second.mT).max(dim=-1)
    gone = best.argsort(dim=-1, descending=True, stable=True)[:, :number]
    stays = torch.ones(means.shape[:2], device=means.device, dtype=torch.int64).scatter(1, 2 * gone, 0)
    place = stays.cumsum(1) - 1
    into = place.gather(1, 2 * partner.gather(1, gone) + 1)
    return place.scatter(1, 2 * gone, into)


def _check(tokens: Tensor, grid: Grid) -> None:
    if tokens.shape[1] != grid[0] * grid[1] * grid[2]:
        raise UnsupportedShape(
            f"tokens has {tokens.shape[1]} tokens, and the grid {grid} has {grid[0] * grid[1] * grid[2]} cells; "
            "reduce before extra tokens are added"
        )
