"""Softmax attention with grouped heads (arXiv 1706.03762, 2305.13245)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import attention
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import Layout, repack, unpack
from ..norm import RMSNorm
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .parts.kv_cache import KVCache, known_filled
from .reference.attention import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Options of `attention`.

    Args:
        heads: query heads, 64 channels each by default.
        kv_heads: heads of keys and values, which divide the query heads; as many by default (1: multi-query).
        rope: rotary positions on queries and keys.
        rope_base: their base.
        qk_norm: RMSNorm on each query and key head.
        gate: a sigmoid gate on the output, from the input.
    """

    heads: int | None = None
    kv_heads: int | None = None
    rope: bool = True
    rope_base: float = 10_000.0
    qk_norm: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "kv_heads", "rope_base")


@register_mixer(
    "attention",
    AttentionConfig,
    summary="softmax attention, grouped heads, rotary positions",
    source="arXiv 1706.03762",
    examples=(AttentionConfig(heads=4), AttentionConfig(heads=4, kv_heads=2, rope=False, qk_norm=True, gate=True)),
    reference=reference,
)
class Attention(Mixer):
    """softmax(q kᵀ / √d) v. Its state holds every key and value that was read, so it grows.

    Under blocks a mask of queries by keys is added to the scores, unless one block holds all tokens.
    """

    capabilities = Capabilities(constant_state=False)
    window: int | None = None
    sinks: int = 0

    def __init__(self, dim: int, config: AttentionConfig, site: Site):
        super().__init__()
        heads = heads_for(dim, config.heads)
        kv_heads = config.kv_heads or heads
        if heads % kv_heads:
            raise ConfigError(f"kv_heads is {kv_heads}; it must divide the {heads} query heads")
        self.size, self.rope_base = dim // heads, config.rope_base if config.rope else None
        self.sizes = (dim, kv_heads * self.size, kv_heads * self.size, dim if config.gate else 0)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.qk_norm = config.qk_norm
        self.q_norm = RMSNorm(self.size, eps=site.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.size, eps=site.norm_eps) if config.qk_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.cache = self.make_cache({name: (kv_heads, self.size) for name in "kv"})
        if config.rope:
            self.capabilities = dataclasses.replace(self.capabilities, reads=frozenset({"positions"}))

    def make_cache(self, shapes: dict[str, tuple[int, int]]) -> KVCache:
        """The cache of keys and values."""
        return KVCache(shapes)

    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        qk, v, gate = self.in_proj(x).split((sum(self.sizes[:2]), *self.sizes[2:]), dim=-1)
        qk, v = (s.unflatten(-1, (-1, self.size)) for s in (qk, v))
        heads = self.sizes[0] // self.size
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :, :heads]), self.k_norm(qk[:, :, heads:])], dim=2)
        if self.rope_base is not None:
            # Queries and keys in one call.
            qk = rotary(qk, context.positions_of(x), self.rope_base)
        # A split, whose gradients are joined; those of slices would be padded and added.
        q, k = qk.split((heads, qk.shape[2] - heads), dim=2)
        if not torch.is_grad_enabled():
            # A cache must not keep the queries' memory.
            k, v = k.contiguous(), v.contiguous()
        o, state = self.attend(q, {"k": k, "v": v}, context.layout, state)
        o = o.flatten(-2)
        return Output(self.out_proj(o * gate.sigmoid() if self.sizes[-1] else o), state)

    def attend(
        self, q: Tensor, rows: dict[str, Tensor], layout: Layout, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Attention of the queries to cached and new keys, and the state after them."""
        masked = layout.block is not None and (isinstance(layout.block, Tensor) or layout.block < q.shape[1])
        if state is not None or masked:
            return self.attend_cached(q, rows, layout, state)
        options = {"window": self.window, "sinks": self.sinks, "cu_seqlens": layout.cu_seqlens}
        o = attention(q, rows["k"], rows["v"], causal=layout.causal is True, **options)
        return o, self.cache.fresh(rows, layout) if layout.causal else None

    def attend_cached(
        self, q: Tensor, rows: dict[str, Tensor], layout: Layout, state: State | None
    ) -> tuple[Tensor, State]:
        """`attend` with a mask by ranks."""
        queries = layout.positions(q, None if state is None else state["count"])
        if layout.causal == "block":
            # What the last token of a block sees, the others see too.
            queries = queries - layout.positions(q) + layout.block_ends(q)
        grown = self.cache.grown(rows, layout, state)
        if layout.cu_seqlens is not None:
            q, queries = unpack(q, layout.cu_seqlens), unpack(queries, layout.cu_seqlens, fill=-1)
        plain = queries.shape[1] == 1 and self.window is None and known_filled(grown["ranks"])
        given = {} if plain else {"q_positions": queries, "k_positions": grown["ranks"]}
        o = attention(q, grown["k"], grown["v"], window=self.window, sinks=self.sinks, **given)
        return o if layout.cu_seqlens is None else repack(o, layout.cu_seqlens), self.cache.kept(grown)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return self.cache.empty(batch, device=device, dtype=dtype)
