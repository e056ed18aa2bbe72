"""Adaptive layer normalisation: a condition shifts, scales and gates every layer (DiT, arXiv 2212.09748)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ResidualConfig, Site, positive
from ..context import Context
from ..layer import Output, SequenceLayer
from ..norm import RMSNorm
from ..parameters import mark
from ..state import State
from .base import Residual, register_residual


@dataclass(frozen=True, kw_only=True)
class AdaLNConfig(ResidualConfig):
    """Options of `adaln`.

    Args:
        condition: channels of `Context.condition`.
    """

    condition: int

    def __post_init__(self) -> None:
        positive(self, "condition")


@register_residual(
    "adaln",
    AdaLNConfig,
    summary="x + gate · f(norm(x) · (1 + scale) + shift), all three from a condition",
    source="arXiv 2212.09748",
    examples=(AdaLNConfig(condition=6),),
)
class AdaLN(Residual):
    """x + α ⊙ f(norm(x) ⊙ (1 + γ) + β), where (β, γ, α) is a linear map of silu(condition) that starts at zero."""

    reads = frozenset({"condition"})

    def __init__(self, dim: int, config: AdaLNConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        self.norm = RMSNorm(dim, eps=site.norm_eps)
        self.channels, self.modulation = config.condition, nn.Linear(config.condition, 3 * dim)
        nn.init.zeros_(self.modulation.weight)
        mark(self.modulation, "weight", initialised=True)

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        condition = context.condition_of(stream, self.channels, self.norm.weight.dtype)
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        out = layer(self.norm(stream) * (1 + scale) + shift, context, state)
        return out._replace(y=stream + self.dropped(out.y * gate, context))
