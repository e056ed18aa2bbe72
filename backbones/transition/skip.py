"""Long skips: what an earlier stage made, joined with the tokens (U-Net, arXiv 1505.04597; U-ViT, arXiv 2209.12152)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UnsupportedCall, UnsupportedShape
from ..config import Site, TransitionConfig, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import Grid, Layout
from ..state import State
from .base import Transition, of_other_tokens, register_transition


@dataclass(frozen=True, kw_only=True)
class SkipConfig(TransitionConfig):
    """Options of `skip`.

    Args:
        source: the stage whose output is joined, "stages.0"; without `expand` also a block's or the input, "blocks.1".
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
    summary="tokens, expanded where wanted, concatenated with an earlier stage's, and one linear map of both",
    source="arXiv 1505.04597, 2209.12152",
    examples=(),
)
class Skip(Transition):
    """W [expand(x), source]. The new context is that of the source's tokens."""

    def __init__(self, dim: int, config: SkipConfig, site: Site, dim_out: int):
        super().__init__()
        self.config, self.shrinks = config, 0.5 if config.expand else 1.0
        source_dim = self.source_dim = config.source_dim or dim
        self.expand = nn.Linear(dim, 4 * source_dim, bias=False) if config.expand else None
        self.joined = nn.Linear(source_dim + (source_dim if config.expand else dim), dim_out, bias=False)
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
        source, layout = self._source(context)
        after = None
        if self.expand is not None:
            coarse, fine = _plain(context.layout), _plain(layout)
            x = _expanded(self.expand(x), coarse, fine)
            after = of_other_tokens(context, fine)
        if x.shape[:2] != source.shape[:2]:
            raise UnsupportedShape(f"skip: x has {x.shape[1]} tokens, and {self.config.source!r} {source.shape[1]}")
        y = self.joined(torch.cat([x, source], dim=-1))
        return Output(y, context=after)

    def _source(self, context: Context) -> tuple[Tensor, Layout | None]:
        """The tokens that are joined, and their layout: a memory's "x", or a tensor, which lies as the tokens do."""
        name, reader = self.config.source, type(self).__name__
        found = context.read(name, reader)
        if isinstance(found, Tensor):
            source, layout = found, context.layout
        else:
            memory = context.memory(name, reader, "x")
            source, layout = memory.tensors["x"], memory.layout
        if source.shape[-1] != self.source_dim:
            raise UnsupportedShape(
                f"skip: {name!r} has {source.shape[-1]} channels, and SkipConfig.source_dim says {self.source_dim}"
            )
        return source, layout


def _plain(layout: Layout | None) -> Layout:
    """The layout, where its cells can become 2 × 2 cells each."""
    if layout is None or layout.causal or layout.grid is None or layout.extra or not layout.rows:
        raise UnsupportedCall(
            "skip with expand needs Layout(causal=False, grid=...) with rows and without extra tokens, of the "
            f"tokens and of the source, not {layout!r}"
        )
    return layout


def _expanded(x: Tensor, coarse: Layout, fine: Layout) -> Tensor:
    """Cells (b, t h w, 4 d) as 2 × 2 cells each, cut to the finer grid; packed images each by itself."""
    if coarse.cu_seqlens is None and fine.cu_seqlens is None:
        return _finer(x, coarse.grids[0], fine.grids[0])
    if coarse.cu_seqlens is None or fine.cu_seqlens is None or len(coarse.grids) != len(fine.grids):
        raise UnsupportedShape(f"skip: the tokens' grids are {coarse.grid}, and the source's {fine.grid}")
    images = x.split([t * h * w for t, h, w in coarse.grids], dim=1)
    grids = zip(coarse.grids, fine.grids, strict=True)
    return torch.cat([_finer(image, *pair) for image, pair in zip(images, grids, strict=True)], dim=1)


def _finer(x: Tensor, coarse: Grid, fine: Grid) -> Tensor:
    (t, h, w), (fine_t, fine_h, fine_w) = coarse, fine
    if fine_t != t or (fine_h + 1) // 2 != h or (fine_w + 1) // 2 != w:
        raise UnsupportedShape(f"skip: the source's grid {fine} is not twice as fine as the tokens', {coarse}")
    x = x.unflatten(1, (t, h, w)).unflatten(-1, (2, 2, -1))
    x = x.permute(0, 1, 2, 4, 3, 5, 6).reshape(x.shape[0], t, 2 * h, 2 * w, -1)
    return x[:, :, :fine_h, :fine_w].flatten(1, 3)
