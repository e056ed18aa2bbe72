"""Long skips: what an earlier stage made, joined with the tokens (U-Net, arXiv 1505.04597; U-ViT, arXiv 2209.12152)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedShape
from ..config import Site, TransitionConfig, positive
from ..context import Context, Memory
from ..layer import Capabilities, Output
from ..layout import Grid
from ..linear import Linear
from ..state import State
from .base import Transition, register_transition


@dataclass(frozen=True, kw_only=True)
class SkipConfig(TransitionConfig):
    """Options of `skip`.

    Args:
        source: the stage whose output is joined, "stages.0".
        source_dim: width of its tokens; the tokens' own by default.
        expand: whether each cell of the grid first becomes 2 × 2 cells (pixel shuffle), where the source's grid is
            twice as fine; an odd side of it is cut off.
    """

    source: str
    source_dim: int | None = None
    expand: bool = False

    def __post_init__(self) -> None:
        positive(self, "source_dim")


@register_transition(
    "skip",
    SkipConfig,
    summary="tokens, expanded where wanted, beside an earlier stage's, and one linear map of both",
    source="arXiv 1505.04597, 2209.12152",
    examples=(),
)
class Skip(Transition):
    """W [expand(x), source]. The new context is that of the source's tokens."""

    def __init__(self, dim: int, config: SkipConfig, site: Site, dim_out: int):
        super().__init__()
        self.config = config
        source_dim = config.source_dim or dim
        self.expand = Linear(dim, 4 * source_dim, bias=False) if config.expand else None
        self.joined = Linear(source_dim + (source_dim if config.expand else dim), dim_out, bias=False)
        sequential = not config.expand
        self.capabilities = Capabilities(
            causal=sequential,
            blockwise=sequential,
            streaming=sequential,
            needs_grid=config.expand,
            receptive_field=1 if sequential else None,
            reads=frozenset({config.source}),
        )

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context = Context.of(context)
        memory: Memory = context.read(self.config.source, type(self).__name__)
        source, layout = memory.tensors["x"], memory.layout
        if self.expand is not None:
            x = _expanded(self.expand(x), context.layout.grid, layout.grid)
        if x.shape[:2] != source.shape[:2]:
            raise UnsupportedShape(f"skip: x has {x.shape[1]} tokens, and {self.config.source!r} {source.shape[1]}")
        y = self.joined(torch.cat([x, source], dim=-1))
        if self.expand is None:
            return Output(y)
        shared = {name: value for name, value in context.shared.items() if isinstance(value, Memory)}
        return Output(y, context=Context(layout, condition=context.condition, shared=shared))


def _expanded(x: Tensor, coarse: Grid, fine: Grid) -> Tensor:
    """Cells (b, t h w, 4 d) as 2 × 2 cells each, cut to the finer grid."""
    (t, h, w), (_, fine_h, fine_w) = coarse, fine
    x = x.unflatten(1, (t, h, w)).unflatten(-1, (2, 2, -1))
    x = x.permute(0, 1, 2, 4, 3, 5, 6).reshape(x.shape[0], t, 2 * h, 2 * w, -1)
    return x[:, :, :fine_h, :fine_w].flatten(1, 3)
