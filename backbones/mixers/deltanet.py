"""DeltaNet (arXiv 2406.06484)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from .base import heads_for
from .parts.delta import DeltaDirection, DeltaMixer
from .reference.deltanet import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    """Options of `deltanet`.

    Args:
        heads: 64 channels each by default.
        conv_size: taps of the short convolution on q, k and v.
        negative: whether β reaches up to 2, and the state's transitions have eigenvalues down to -1 (arXiv 2411.12537).
    """

    heads: int | None = None
    conv_size: int = 4
    negative: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "conv_size")


@register_mixer(
    "deltanet",
    DeltaNetConfig,
    summary="linear attention that replaces what its state holds for a key",
    source="arXiv 2406.06484",
    examples=(DeltaNetConfig(heads=2), DeltaNetConfig(heads=4, conv_size=1, negative=True)),
    reference=reference,
)
class DeltaNet(DeltaMixer):
    """S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ with unit q and k, β_t = σ(w x_t); normalised by head."""

    def __init__(self, dim: int, config: DeltaNetConfig, site: Site):
        heads, sizes = heads_for(dim, config.heads), (dim, dim, dim)
        super().__init__(site, heads, sizes, config.conv_size)
        self.in_proj = nn.Linear(dim, sum(sizes) + heads, bias=False)
        self.branches = nn.ModuleList(
            DeltaDirection(heads, sizes, config.conv_size, 2.0 if config.negative else 1.0) for _ in site.scan
        )
        self.norm = RMSNorm(dim, eps=site.norm_eps, groups=heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        return self.in_proj(x).split((sum(self.sizes), self.heads), dim=-1), None

    def finish(self, mixed: Tensor, kept: None) -> Tensor:
        return self.out_proj(self.norm(mixed))
