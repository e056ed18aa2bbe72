"""Learned tokens before every sequence (Hymba, arXiv 2411.13676; registers, arXiv 2309.16588)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedCall
from ..config import Site, TransitionConfig, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import Layout, offsets
from ..parameters import mark
from ..state import State
from .base import Transition, register_transition


@dataclass(frozen=True, kw_only=True)
class MetaTokensConfig(TransitionConfig):
    """Options of `meta_tokens`.

    Args:
        tokens: how many.
    """

    tokens: int = 128

    def __post_init__(self) -> None:
        positive(self, "tokens")


@register_transition(
    "meta_tokens",
    MetaTokensConfig,
    summary="learned tokens before every sequence; the initial state is the state after them",
    source="arXiv 2411.13676",
    examples=(MetaTokensConfig(tokens=3),),
)
class MetaTokens(Transition):
    """Puts the learned tokens before the first one, and `Context.keep` leaves them out of the backbone's output.

    A condition of the sequence is theirs too; one for each token is zero for them.
    """

    capabilities = Capabilities(blockwise=False, receptive_field=1)
    primes = True

    def __init__(self, dim: int, config: MetaTokensConfig, site: Site, dim_out: int):
        super().__init__()
        if dim != dim_out:
            raise ConfigError(f"meta_tokens keeps the width {dim}, and the stage's is {dim_out}")
        self.tokens = nn.Parameter(torch.randn(config.tokens, dim) * 0.02)
        mark(self, "tokens", decay=False)

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context = Context.of(context)
        layout, count = context.layout, len(self.tokens)
        if layout.causal == "block" or layout.grid is not None or context.shared or context.keep is not None:
            raise UnsupportedCall(
                "meta_tokens serves plain sequences: no blocks, grid, shared values or keep in the context"
            )
        positions = None if context.positions is None else context.positions + count
        if state is not None:
            return Output(x, state, context=context.replace(positions=positions))
        n, lengths = layout.sequences(x.shape[0]), layout.lengths(x)
        meta, condition = self.tokens.to(x.dtype), context.condition
        if layout.cu_seqlens is None:
            x = torch.cat([meta.expand(n, -1, -1), x], dim=1)
            keep = torch.arange(count, x.shape[1], device=x.device).expand(n, -1)
            after = Layout(causal=layout.causal)
        else:
            boundaries = offsets(lengths + count).to(layout.cu_seqlens.dtype)
            after = Layout(causal=layout.causal, cu_seqlens=boundaries)
            place = after.positions(x.new_empty(1, x.shape[1] + n * count, 1))[0]
            keep = (place >= count).nonzero()[:, 0]
            x = meta[place.clamp(max=count - 1)][None].index_copy(1, keep, x)
            keep = keep[None]
        if positions is not None:
            # The meta tokens stand at 0, 1, 2 ... before everything else.
            own = after.positions(x)
            positions = own.scatter(1, keep, positions) if positions.ndim == 2 else _per_axis(own, keep, positions)
        if condition is not None and condition.ndim == 3:
            longer = condition.new_zeros(*x.shape[:2], condition.shape[-1])
            condition = longer.scatter(1, keep[..., None].expand_as(condition), condition)
        state = State({"begun": torch.ones(n, device=x.device, dtype=torch.int64)}) if layout.causal else None
        changed = context.replace(layout=after, positions=positions, condition=condition, keep=keep)
        return Output(x, state, context=changed)


def _per_axis(own: Tensor, keep: Tensor, positions: Tensor) -> Tensor:
    """Positions with several axes, of the meta tokens the same on each."""
    own = own[..., None].expand(*own.shape, positions.shape[-1])
    return own.scatter(1, keep[..., None].expand_as(positions), positions)
