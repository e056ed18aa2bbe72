"""Keys and values that all later layers share, and the early exit that they allow (YOCO, arXiv 2405.05254)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import Site, TransitionConfig, positive
from ..context import Context, Memory
from ..layer import Capabilities, Output
from ..mixers.base import heads_for
from ..mixers.parts.kv_cache import KVCache
from ..norm import RMSNorm
from ..rotary import rotary
from ..state import State
from .base import Transition, register_transition


@dataclass(frozen=True, kw_only=True)
class SharedKVConfig(TransitionConfig):
    """Options of `shared_kv`.

    Args:
        name: of the `Memory` in `Context.shared` with keys "k" and values "v", for `cross_attention(projected=True)`.
        heads: query heads of the readers, 64 channels each by default.
        kv_heads: heads of keys and values; as many by default.
        rope: rotary positions on the keys.
        rope_base: their base.
    """

    name: str = "kv"
    heads: int | None = None
    kv_heads: int | None = None
    rope: bool = True
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        positive(self, "heads", "kv_heads", "rope_base")


@register_transition(
    "shared_kv",
    SharedKVConfig,
    summary="one cache of keys and values for all later layers; they run for the tokens to keep only",
    source="arXiv 2405.05254",
    examples=(SharedKVConfig(heads=2),),
)
class SharedKV(Transition):
    """k, v = W norm(x), cached once; applies `Context.keep`, so that a prefill ends here for all others."""

    def __init__(self, dim: int, config: SharedKVConfig, site: Site, dim_out: int):
        super().__init__()
        if dim != dim_out:
            raise ConfigError(f"shared_kv keeps the width {dim}, and the stage's is {dim_out}")
        self.config = config
        heads = heads_for(dim, config.heads)
        self.size, kv_heads = dim // heads, config.kv_heads or heads
        self.norm = RMSNorm(dim, eps=site.norm_eps)
        self.kv_proj = nn.Linear(dim, 2 * kv_heads * self.size, bias=False)
        self.cache = KVCache({name: (kv_heads, self.size) for name in "kv"} | {"positions": ()})
        self.capabilities = Capabilities(
            constant_state=False,
            blockwise=False,
            receptive_field=1,
            reads=frozenset({"positions"}),
            writes=frozenset({config.name}),
        )

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context, config = Context.of(context), self.config
        positions = context.positions_of(x)
        k, v = self.kv_proj(self.norm(x)).unflatten(-1, (-1, self.size)).chunk(2, dim=-2)
        k = rotary(k, positions, config.rope_base) if config.rope else k
        grown = self.cache.grown({"k": k, "v": v, "positions": positions}, context.layout, state)
        memory = Memory({"k": grown["k"], "v": grown["v"]}, grown["positions"])
        after = self.cache.kept(grown) if context.layout.causal else None
        if context.keep is None:
            return Output(x, after, shared={config.name: memory})
        y, kept = context.take(context.keep, x)
        return Output(y, after, shared={config.name: memory}, context=kept)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return self.cache.empty(batch, device=device, dtype=dtype)
