"""Patch merging: 2 × 2 cells become one, as in Swin and other pyramids (arXiv 2103.14030)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedCall
from ..config import Site, TransitionConfig
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import Grid, Layout
from ..norm import RMSNorm
from ..state import State
from .base import Transition, of_other_tokens, register_transition


@dataclass(frozen=True, kw_only=True)
class MergeConfig(TransitionConfig):
    """`merge` has no options."""


@register_transition(
    "merge",
    MergeConfig,
    summary="2 × 2 cells of the grid become one",
    source="arXiv 2103.14030",
    examples=(MergeConfig(),),
)
class Merge(Transition):
    """W norm([x₀₀, x₁₀, x₀₁, x₁₁]) of every 2 × 2 cells; an odd side is filled up with zeros. Packed images are merged
    each by itself."""

    capabilities = Capabilities(causal=False, blockwise=False, streaming=False, needs_grid=True)
    shrinks = 2.0

    def __init__(self, dim: int, config: MergeConfig, site: Site, dim_out: int):
        super().__init__()
        self.norm = RMSNorm(4 * dim, eps=site.norm_eps)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False)

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context = Context.of(context)
        layout = context.layout
        if layout.causal or layout.grid is None or layout.extra or not layout.rows:
            raise UnsupportedCall(
                f"merge needs Layout(causal=False, grid=...) with rows and without extra tokens, not {layout!r}"
            )
        if layout.cu_seqlens is None:
            merged, grid = _merged(x, layout.grids[0])
            after = Layout(causal=False, grid=grid)
        else:
            rows = x.split([t * h * w for t, h, w in layout.grids], dim=1)
            parts = [_merged(row, grid) for row, grid in zip(rows, layout.grids, strict=True)]
            merged = torch.cat([part for part, _ in parts], dim=1)
            lengths = torch.tensor([0, *(part.shape[1] for part, _ in parts)], device=x.device)
            boundaries = lengths.cumsum(0).to(layout.cu_seqlens.dtype)
            after = Layout(causal=False, cu_seqlens=boundaries, grid=tuple(grid for _, grid in parts))
        return Output(self.reduction(self.norm(merged)), context=of_other_tokens(context, after))


def _merged(x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Cells (b, t h w, d) as (b, t h/2 w/2, 4 d), and their grid."""
    t, h, w = grid
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, w % 2, 0, h % 2))
    h, w = (h + 1) // 2, (w + 1) // 2
    x = x.unflatten(3, (w, 2)).unflatten(2, (h, 2))
    return x.permute(0, 1, 2, 4, 5, 3, 6).reshape(x.shape[0], t * h * w, -1), (t, h, w)
