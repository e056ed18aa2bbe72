"""Softmax attention with grouped heads (arXiv 1706.03762, 2305.13245)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import attention
from ..config import MixerConfig, Site, positive
from ..layout import Layout, repack, unpack
from ..linear import Linear
from ..norm import RMSNorm
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .cache import appended, known_filled
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
)
class Attention(Mixer):
    """softmax(q kᵀ / √d) v. Its state holds every key and value that was read, so it grows.

    Under blocks a mask of queries by keys stands beside the scores, unless one block holds all tokens.
    """

    bidirectional = True
    blockwise = True
    constant_state = False
    window: int | None = None
    sinks: int = 0

    def __init__(self, dim: int, config: AttentionConfig, site: Site):
        super().__init__()
        heads = heads_for(dim, config.heads)
        kv_heads = config.kv_heads or heads
        if heads % kv_heads:
            raise ConfigError(f"kv_heads is {kv_heads}; it must divide the {heads} query heads")
        self.size, self.kv_heads, self.rope_base = dim // heads, kv_heads, config.rope_base if config.rope else None
        self.sizes = (dim, kv_heads * self.size, kv_heads * self.size, dim if config.gate else 0)
        self.in_proj = Linear(dim, sum(self.sizes), bias=False)
        self.q_norm = RMSNorm(self.size, eps=site.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.size, eps=site.norm_eps) if config.qk_norm else nn.Identity()
        self.out_proj = Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        q, k, v, gate = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (s.unflatten(-1, (-1, self.size)) for s in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        places = layout.positions(x, None if state is None else state["position"])
        if self.rope_base is not None:
            q, k = rotary(q, places, self.rope_base), rotary(k, places, self.rope_base)
        masked = layout.causal == "block" and layout.block < x.shape[1]
        if state is None and not masked:
            causal = layout.causal is True
            o = attention(q, k, v, causal=causal, window=self.window, sinks=self.sinks, cu_seqlens=layout.cu_seqlens)
            cache = self._remember(k, v, places, layout, None) if layout.causal else None
        else:
            o, cache = self._go_on(q, k, v, places, layout, state)
        o = o.flatten(-2)
        return self.out_proj(o * gate.sigmoid() if self.sizes[-1] else o), cache

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, layout: Layout, state: State | None
    ) -> tuple[Tensor, State]:
        if layout.cu_seqlens is not None:
            q = unpack(q, layout.cu_seqlens)
        k, v, slots = self._append(k, v, places, layout, state)
        queries = places
        if layout.causal == "block":
            # What the last token of a block sees, the others see too.
            queries = places - layout.positions(places) + layout.block_ends(places)
        if layout.cu_seqlens is not None:
            queries = unpack(queries, layout.cu_seqlens, fill=-1)
        plain = queries.shape[1] == 1 and self.window is None and known_filled(slots)
        given = {} if plain else {"q_positions": queries, "k_positions": slots}
        o = attention(q, k, v, window=self.window, sinks=self.sinks, **given)
        if layout.cu_seqlens is not None:
            o = repack(o, layout.cu_seqlens)
        read = layout.lengths(places)
        return o, self._keep(k, v, slots, read if state is None else read + state["position"])

    def _remember(self, k: Tensor, v: Tensor, places: Tensor, layout: Layout, state: State | None) -> State:
        k, v, slots = self._append(k, v, places, layout, state)
        return self._keep(k, v, slots, layout.lengths(places))

    def _append(
        self, k: Tensor, v: Tensor, places: Tensor, layout: Layout, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cached and new keys and values, (n, s, g, d), and the position in each slot, −1 where it is empty."""
        slots = places
        if layout.cu_seqlens is not None:
            k, v = unpack(k, layout.cu_seqlens), unpack(v, layout.cu_seqlens)
            slots = unpack(places, layout.cu_seqlens, fill=-1)
        if state is None:
            return k, v, slots
        return appended(state["k"], k), appended(state["v"], v), appended(state["slots"], slots)

    def _keep(self, k: Tensor, v: Tensor, slots: Tensor, position: Tensor) -> State:
        return State({"k": k, "v": v, "slots": slots, "position": position})

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return self._empty(batch, 0, device=device, dtype=dtype)

    def _empty(self, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype) -> State:
        empty = torch.zeros(batch, slots, self.kv_heads, self.size, device=device, dtype=dtype)
        return State(
            {
                "k": empty,
                "v": empty.clone(),
                "slots": torch.full((batch, slots), -1, device=device),
                "position": torch.zeros(batch, device=device, dtype=torch.int64),
            }
        )
