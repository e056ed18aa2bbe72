"""Linear attention with a positive feature map (arXiv 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import gated_linear
from ...utils.modes import own_precision
from ..config import MixerConfig, Site, positive
from ..layout import Layout, repack, unpack
from ..state import State
from .base import Mixer, heads_for
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
    """Options of `linear`.

    Args:
        heads: 64 channels each by default.
        feature_map: φ, "elu" (elu + 1, the Linear Transformer's) or "relu" (EfficientViT's, arXiv 2205.14756).
        eps: added to the normaliser.
    """

    heads: int | None = None
    feature_map: Literal["elu", "relu"] = "elu"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "heads")
        if self.feature_map not in ("elu", "relu"):
            raise ConfigError(f"feature_map is {self.feature_map!r}; it must be 'elu' or 'relu'")


@register_mixer(
    "linear",
    LinearConfig,
    summary="linear attention, normalised, φ = elu + 1 or ReLU",
    source="arXiv 2006.16236",
    examples=(LinearConfig(heads=4), LinearConfig(heads=2, feature_map="relu")),
)
class Linear(Mixer):
    """φ(q)ᵀ Σ φ(k) vᵀ / φ(q)ᵀ Σ φ(k); both ways the sums run over the whole sequence, in blocks to a block's end."""

    bidirectional = True
    blockwise = True

    def __init__(self, dim: int, config: LinearConfig, site: Site):
        super().__init__()
        self.heads = heads_for(dim, config.heads)
        self.feature_map, self.eps = config.feature_map, config.eps
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.size = dim // self.heads

    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        q, k, v = (s.unflatten(-1, (self.heads, -1)) for s in self.in_proj(x).chunk(3, dim=-1))
        q, k = self._features(q), self._features(k)
        # A channel of ones beside the values sums φ(k): numerator and normaliser come out of one product.
        v = F.pad(v, (0, 1), value=1.0)
        if layout.causal is True:
            memory = None if state is None else state["memory"]
            o, memory = gated_linear(q, k, v, scale=1.0, initial_state=memory, cu_seqlens=layout.cu_seqlens)
            state = State({"memory": memory})
        else:
            rows = (q, k, v) if layout.cu_seqlens is None else [unpack(s, layout.cu_seqlens) for s in (q, k, v)]
            o, memory = self._both_ways(*rows, layout.block, None if state is None else state["memory"])
            o = o if layout.cu_seqlens is None else repack(o, layout.cu_seqlens)
            state = State({"memory": memory}) if layout.causal else None
        o = (o[..., :-1] / (o[..., -1:] + self.eps)).to(x.dtype)
        return self.out_proj(o.flatten(-2)), state

    def _features(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1 if self.feature_map == "elu" else F.relu(x)

    def _both_ways(
        self, q: Tensor, k: Tensor, v: Tensor, block: int | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The sums up to the end of each token's block, read by it, and those at the end of all."""
        wide, t = torch.promote_types(v.dtype, torch.float32), v.shape[1]
        size = min(block or t, t)
        q, k, v = (F.pad(s.to(wide), (0, 0, 0, 0, 0, -t % size)).unflatten(1, (-1, size)) for s in (q, k, v))
        with own_precision(v.device.type):
            sums = torch.einsum("bnthk,bnthv->bnhkv", k, v).cumsum(1)
            sums = sums if memory is None else sums + memory[:, None]
            return torch.einsum("bnthk,bnhkv->bnthv", q, sums).flatten(1, 2)[:, :t], sums[:, -1]

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.size, self.size + 1)
        return State({"memory": torch.zeros(shape, device=device, dtype=wide)})
