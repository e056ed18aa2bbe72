"""A layer whose linear maps have low-rank corrections, which stay its own where the layer is tied to another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import FFNConfig, MixerConfig, Site, configured, positive
from ..context import Context
from ..layer import Output, SequenceLayer
from ..parameters import mark
from ..registry import build_part
from ..state import State
from .base import WrapperConfig, register_wrapper


@dataclass(frozen=True, kw_only=True)
class LowRankDeltasConfig(WrapperConfig):
    """Options of `low_rank_deltas`.

    Args:
        inner: the layer: a mixer's configuration or name, or a feed-forward layer's configuration.
        rank: of the corrections.
    """

    inner: MixerConfig | FFNConfig | str
    rank: int = 16

    def __post_init__(self) -> None:
        positive(self, "rank")
        if isinstance(self.inner, str):
            object.__setattr__(self, "inner", configured(MixerConfig, self.inner))


class Corrected(nn.Module):
    """x Wᵀ + x Dᵀ Uᵀ, where U starts at zero (arXiv 2106.09685)."""

    per_use = ("down", "up")

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        mark(self.up, "weight", initialised=True)

    @property
    def weight(self) -> Tensor:
        """The weight that is corrected, for what scales it at initialisation."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@register_wrapper(
    "low_rank_deltas",
    LowRankDeltasConfig,
    summary="a layer with low-rank corrections of its projections, kept per use",
    source="arXiv 2411.15242",
    examples=(),
)
class LowRankDeltas(SequenceLayer):
    """`inner`, whose projections in and out are corrected (Zamba2, arXiv 2411.15242)."""

    def __init__(self, dim: int, config: LowRankDeltasConfig, site: Site):
        super().__init__()
        self.inner = build_part(config.inner, dim, site)
        self.capabilities = self.inner.capabilities
        for name in ("in_proj", "out_proj"):
            base = getattr(self.inner, name, None)
            if isinstance(base, nn.Linear):
                setattr(self.inner, name, Corrected(base, config.rank))

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        return self.inner(x, context, state)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State | None:
        return self.inner.init_state(batch, device=device, dtype=dtype)

    def residual_outputs(self) -> list[nn.Module]:
        return [output for output in self.inner.residual_outputs() if isinstance(output.weight, Tensor)]
