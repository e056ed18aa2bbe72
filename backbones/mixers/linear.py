"""Linear attention with a positive feature map (arXiv 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import gated_linear
from ...utils.modes import own_precision
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import Layout
from ..scan import permute, restore
from ..state import State
from .base import Mixer, heads_for
from .reference.linear import reference
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
        positive(self, "heads", "eps")


@register_mixer(
    "linear",
    LinearConfig,
    summary="linear attention, normalised, φ = elu + 1 or ReLU",
    source="arXiv 2006.16236",
    examples=(LinearConfig(heads=4), LinearConfig(heads=2, feature_map="relu")),
    reference=reference,
)
class Linear(Mixer):
    """φ(q)ᵀ Σ φ(k) vᵀ / φ(q)ᵀ Σ φ(k); bidirectional, the sums run over the whole sequence, under blocks to a
    block's end."""

    capabilities = Capabilities()

    def __init__(self, dim: int, config: LinearConfig, site: Site):
        super().__init__()
        self.heads = heads_for(dim, config.heads)
        self.feature_map, self.eps = config.feature_map, config.eps
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.size = dim // self.heads

    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        layout, memory = context.layout, None if state is None else state["memory"]
        q, k, v = (s.unflatten(-1, (self.heads, -1)) for s in self.in_proj(x).chunk(3, dim=-1))
        q, k = self._features(q), self._features(k)
        # A channel of ones next to the values sums φ(k): numerator and normaliser come out of one product. Both grow
        # with the sequence, out of float16's range, and are wide until they are divided.
        v = F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)
        if layout.causal is True:
            o, memory = gated_linear(q, k, v, scale=1.0, initial_state=memory, cu_seqlens=layout.cu_seqlens)
        elif layout.cu_seqlens is not None or isinstance(layout.block, Tensor):
            o, memory = self._by_segments(q, k, v, layout, memory)
        else:
            o, memory = self._by_blocks(q, k, v, layout.block, memory)
        o = (o[..., :-1] / (o[..., -1:] + self.eps)).to(x.dtype)
        return Output(self.out_proj(o.flatten(-2)), State({"memory": memory}) if layout.causal else None)

    def _features(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1 if self.feature_map == "elu" else F.relu(x)

    def _by_blocks(
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

    def _by_segments(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`_by_blocks` for blocks, or packed sequences that are one block each, of any lengths: what is not after a
        token, and what is not before it in its block, without the token itself, which is in both."""
        (b, t), wide = v.shape[:2], torch.promote_types(v.dtype, torch.float32)
        q, k, v = (s.to(wide) for s in (q, k, v))
        forward, memory = gated_linear(q, k, v, scale=1.0, initial_state=memory, cu_seqlens=layout.cu_seqlens)
        inside = layout.cu_seqlens if layout.block is None else layout.block_boundaries(v)
        inside = Layout(causal=False, cu_seqlens=inside)
        rows = (permute(s.reshape(1, b * t, *s.shape[2:]), "backward", inside) for s in (q, k, v))
        backward, _ = gated_linear(*rows, scale=1.0, cu_seqlens=inside.cu_seqlens)
        backward = restore(backward, "backward", inside).view_as(forward)
        return forward + backward - (q * k).sum(-1, keepdim=True) * v, memory

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.size, self.size + 1)
        return State({"memory": torch.zeros(shape, device=device, dtype=wide)})
