"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from .base import heads_for
from .parts.delta import DeltaDirection, DeltaMixer
from .parts.step_decay import StepDecay
from .reference.kda import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class KDAConfig(MixerConfig):
    """Options of `kda`.

    Args:
        heads: 64 channels each by default.
        conv_size: taps of the short convolution on q, k and v.
        gate_rank: rank of the projections that make the decays and the output gate; a head's channels by default.
        negative: whether β reaches up to 2 (arXiv 2411.12537).
    """

    heads: int | None = None
    conv_size: int = 4
    gate_rank: int | None = None
    negative: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "conv_size", "gate_rank")


class _Direction(DeltaDirection):
    """One direction, with its decay: per channel, from a projection of low rank."""

    def __init__(self, heads: int, dim: int, rank: int, config: KDAConfig):
        super().__init__(heads, (dim, dim, dim), config.conv_size, 2.0 if config.negative else 1.0)
        self.decay_down = nn.Linear(dim, rank, bias=False)
        self.decay_up = nn.Linear(rank, dim, bias=False)
        self.step = StepDecay(heads, dim)

    def decay(self, *gates: Tensor) -> Tensor:
        return self.step(self.decay_up(self.decay_down(*gates)))


@register_mixer(
    "kda",
    KDAConfig,
    summary="the delta rule with a decay per channel",
    source="arXiv 2510.26692",
    examples=(KDAConfig(heads=2), KDAConfig(heads=4, conv_size=2, gate_rank=3, negative=True)),
    reference=reference,
)
class KDA(DeltaMixer):
    """S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ; normalised by head, with a gate of low rank."""

    def __init__(self, dim: int, config: KDAConfig, site: Site):
        heads, sizes = heads_for(dim, config.heads), (dim, dim, dim)
        super().__init__(site, heads, sizes, config.conv_size)
        self.rank = rank = dim // heads if config.gate_rank is None else config.gate_rank
        self.in_proj = nn.Linear(dim, sum(sizes) + heads + rank, bias=False)
        self.gate_up = nn.Linear(rank, dim)
        self.branches = nn.ModuleList(_Direction(heads, dim, rank, config) for _ in site.scan)
        self.norm = RMSNorm(dim, eps=site.norm_eps, groups=heads, gate="sigmoid")
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        qkv, beta, gate = self.in_proj(x).split((sum(self.sizes), self.heads, self.rank), dim=-1)
        return (qkv, beta, x), self.gate_up(gate)

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))
