"""Gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from .base import heads_for
from .parts.delta import DeltaDirection, DeltaMixer
from .parts.step_decay import StepDecay
from .reference.gated_deltanet import reference
from .registry import register_mixer

# As released, A is uniform from 0 to 16 (flash-linear-attention, fla/layers/gated_deltanet.py); 0 has no logarithm.
SLOWEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """Options of `gated_deltanet`.

    Args:
        heads: as many as there are 64 channels of the model by default.
        key_ratio, value_ratio: channels of the keys and of the values per channel of the model.
        conv_size: taps of the short convolution on q, k and v.
        negative: whether β reaches up to 2 (arXiv 2411.12537).
    """

    heads: int | None = None
    key_ratio: float = 0.75
    value_ratio: float = 1.5
    conv_size: int = 4
    negative: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "key_ratio", "value_ratio", "conv_size")


class _Direction(DeltaDirection):
    """One direction, with its decay: a scalar per step and head."""

    def __init__(self, heads: int, sizes: tuple[int, int, int], conv_size: int, most: float):
        super().__init__(heads, sizes, conv_size, most)
        self.step = StepDecay(heads, heads, SLOWEST)

    def decay(self, *gates: Tensor) -> Tensor:
        return self.step(*gates).squeeze(-1)


@register_mixer(
    "gated_deltanet",
    GatedDeltaNetConfig,
    summary="the delta rule with a scalar decay per head that depends on the input",
    source="arXiv 2412.06464",
    examples=(GatedDeltaNetConfig(heads=2), GatedDeltaNetConfig(heads=4, conv_size=2, negative=True)),
    reference=reference,
)
class GatedDeltaNet(DeltaMixer):
    """S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, α_t as in Mamba-2; normalised by head, with a swish gate."""

    def __init__(self, dim: int, config: GatedDeltaNetConfig, site: Site):
        heads = heads_for(dim, config.heads)
        key, value = (max(1, round(dim * r / heads)) * heads for r in (config.key_ratio, config.value_ratio))
        sizes = (key, key, value)
        super().__init__(site, heads, sizes, config.conv_size)
        self.in_proj = nn.Linear(dim, sum(sizes) + 2 * heads + value, bias=False)
        self.branches = nn.ModuleList(
            _Direction(heads, sizes, config.conv_size, 2.0 if config.negative else 1.0) for _ in site.scan
        )
        self.norm = RMSNorm(value, eps=site.norm_eps, groups=heads)
        self.out_proj = nn.Linear(value, dim, bias=False)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        *streams, gate = self.in_proj(x).split((sum(self.sizes), self.heads, self.heads, self.sizes[2]), dim=-1)
        return tuple(streams), gate

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))
