"""Retention (arXiv 2307.08621)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import gated_linear
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from ..rotary import rotary
from ..state import State
from .base import ScanMixer, heads_for
from .reference.retention import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    """Options of `retention`.

    Args:
        heads: 64 key channels each by default.
        value_ratio: value channels per channel of the model.
        rope_base: base of the rotary positions on queries and keys.
    """

    heads: int | None = None
    value_ratio: int = 2
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        positive(self, "heads", "value_ratio", "rope_base")


class _Direction(nn.Module):
    """One direction: rotary positions and a constant decay a head, both in the direction's own order."""

    def __init__(self, heads: int, rope_base: float):
        super().__init__()
        self.heads, self.rope_base = heads, rope_base
        self.decay = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        q, k, v = (s.unflatten(-1, (self.heads, -1)) for s in streams)
        positions = context.positions_of(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        o, memory = gated_linear(
            rotary(q, positions, self.rope_base),
            rotary(k, positions, self.rope_base),
            v,
            torch.tensor(self.decay, device=q.device, dtype=wide),
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        return o.flatten(-2), State({"memory": memory})


@register_mixer(
    "retention",
    RetentionConfig,
    summary="linear attention with a constant decay per head",
    source="arXiv 2307.08621",
    examples=(RetentionConfig(heads=2),),
    reference=reference,
)
class Retention(ScanMixer):
    """S_t = γ_h S_{t-1} + k_t v_tᵀ with γ_h = 1 − 2^(−5−h) and rotary positions; normalised by head, swish gate."""

    capabilities = dataclasses.replace(ScanMixer.capabilities, reads=frozenset({"positions"}))

    def __init__(self, dim: int, config: RetentionConfig, site: Site):
        super().__init__(site)
        heads = heads_for(dim, config.heads)
        value_dim = dim * config.value_ratio
        self.sizes = (dim, dim, value_dim, value_dim)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.branches = nn.ModuleList(_Direction(heads, config.rope_base) for _ in site.scan)
        self.norm = RMSNorm(value_dim, eps=site.norm_eps, groups=heads)
        self.out_proj = nn.Linear(value_dim, dim, bias=False)
        self.state_shape = (heads, dim // heads, value_dim // heads)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        q, k, v, gate = self.in_proj(x).split(self.sizes, dim=-1)
        return (q, k, v), gate

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State({"memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide)})
