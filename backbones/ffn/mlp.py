"""Dense feed-forward layers: the MLP and SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import FFNConfig, Site, positive
from ..context import Context
from ..layer import Output
from ..state import State
from .base import FFN, register_ffn


@dataclass(frozen=True, kw_only=True)
class MLPConfig(FFNConfig):
    """Options of `mlp`.

    Args:
        ratio: hidden channels per channel.
    """

    ratio: float = 4.0

    def __post_init__(self) -> None:
        positive(self, "ratio")


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(MLPConfig):
    """Options of `swiglu`.

    Args:
        ratio: hidden channels per channel; 8/3 has the parameters of an MLP with 4.
    """

    ratio: float = 8 / 3


@register_ffn(
    "mlp",
    MLPConfig,
    summary="two linear layers around GELU",
    source="arXiv 1606.08415",
    examples=(MLPConfig(ratio=2.0),),
)
class MLP(FFN):
    """W₂ GELU(W₁ x)."""

    def __init__(self, dim: int, config: MLPConfig, site: Site):
        super().__init__()
        hidden = max(1, round(dim * config.ratio))
        self.in_proj = nn.Linear(dim, hidden)
        self.out_proj = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b t d"], context: Context, state: State | None = None) -> Output:
        return Output(self.out_proj(F.gelu(self.in_proj(x))))


@register_ffn(
    "swiglu",
    SwiGLUConfig,
    summary="a linear layer gated by swish",
    source="arXiv 2002.05202",
    examples=(SwiGLUConfig(ratio=2.0),),
)
class SwiGLU(FFN):
    """W₂ (swish(W₁ x) ⊙ W₃ x)."""

    def __init__(self, dim: int, config: SwiGLUConfig, site: Site):
        super().__init__()
        # A multiple of 8 keeps the products aligned.
        hidden = max(8, round(dim * config.ratio / 8) * 8)
        self.in_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], context: Context, state: State | None = None) -> Output:
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return Output(self.out_proj(F.silu(gate) * value))
