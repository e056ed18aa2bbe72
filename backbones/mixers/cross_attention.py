"""Attention to given tokens: an encoder's, an image's, or keys and values that another layer shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedShape
from ...kernels import attention
from ..config import Site, positive
from ..context import Context, Memory
from ..layer import Capabilities, Output
from ..layout import repack, unpack
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .registry import CrossMixerConfig, register_cross_mixer


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig(CrossMixerConfig):
    """Options of `cross_attention`.

    Args:
        source: name of the `Memory` in `Context.shared`, with tokens "x", or with keys "k" and values "v" as they are
            attended to, (n, s, kv_heads, size).
        heads: query heads, 64 channels each by default.
        kv_heads: heads of keys and values, which divide the query heads; as many by default.
        source_dim: width of the memory's tokens; the layer's by default.
        projected: whether the memory holds "k" and "v" instead of "x".
        rope: rotary positions on the queries, and on keys that are made here.
        rope_base: their base.
    """

    source: str
    heads: int | None = None
    kv_heads: int | None = None
    source_dim: int | None = None
    projected: bool = False
    rope: bool = False
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        positive(self, "heads", "kv_heads", "source_dim", "rope_base")
        if self.source == "input" or self.source.startswith("blocks."):
            raise ConfigError(
                f"CrossAttentionConfig.source is {self.source!r}, which is a tensor; it must name a Memory: one that "
                "the caller passes or a layer writes, or a stage's output, as in 'stages.0'"
            )


@register_cross_mixer(
    "cross_attention",
    CrossAttentionConfig,
    summary="attention to given tokens, or to shared keys and values",
    source="arXiv 1706.03762, 2204.14198",
    examples=(),
)
class CrossAttention(Mixer):
    """softmax(q kᵀ / √d) v over the slots of a memory whose positions are not after the token's, in causal layouts; in
    others over all of them. A token that sees no slot gets zeros. There is no state: the memory is the state."""

    def __init__(self, dim: int, config: CrossAttentionConfig, site: Site):
        super().__init__()
        self.config = config
        heads = heads_for(dim, config.heads)
        self.kv_heads, self.size = config.kv_heads or heads, dim // heads
        if heads % self.kv_heads:
            raise ConfigError(f"kv_heads is {self.kv_heads}; it must divide the {heads} query heads")
        self.q_proj = nn.Linear(dim, dim, bias=False)
        if not config.projected:
            self.source_dim = config.source_dim or dim
            self.kv_proj = nn.Linear(self.source_dim, 2 * self.kv_heads * self.size, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        # What is published holds the tokens of one call; a memory from elsewhere is the same in all of them.
        streaming = not config.source.startswith("stages.")
        reads = frozenset({config.source, "positions"})
        self.capabilities = Capabilities(streaming=streaming, receptive_field=1, reads=reads)

    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        positions, layout = context.positions_of(x), context.layout
        memory = self._memory(context, layout.sequences(x.shape[0]))
        if not memory.positions.numel():
            return Output(self.out_proj(torch.zeros_like(x)))
        q = self.q_proj(x).unflatten(-1, (-1, self.size))
        q = rotary(q, positions, self.config.rope_base) if self.config.rope else q
        k, v = self._keys(memory)
        # Where nothing is causal, every filled slot is seen: all queries stand at the last slot's position.
        seen = positions if layout.causal else memory.positions.amax().expand_as(positions)
        if layout.cu_seqlens is not None:
            q, seen = unpack(q, layout.cu_seqlens), unpack(seen, layout.cu_seqlens, fill=-1)
        o = attention(q, k, v, q_positions=seen, k_positions=memory.positions)
        o = o if layout.cu_seqlens is None else repack(o, layout.cu_seqlens)
        return Output(self.out_proj(o.flatten(-2)))

    def _memory(self, context: Context, sequences: int) -> Memory:
        """The memory, one row for each sequence."""
        name, wanted = self.config.source, ("k", "v") if self.config.projected else ("x",)
        memory = context.memory(name, type(self).__name__, *wanted)
        if memory.layout is not None and memory.layout.cu_seqlens is not None:
            boundaries = memory.layout.cu_seqlens
            rows = {key: unpack(memory.tensors[key], boundaries) for key in wanted}
            memory = Memory(rows, unpack(memory.positions, boundaries, fill=-1))
        if len(memory.positions) != sequences:
            found = len(memory.positions)
            raise UnsupportedShape(f"cross_attention: {name!r} has {found} sequences, and the tokens {sequences}")
        channels = memory.tensors[wanted[0]].shape[-1]
        takes = self.size if self.config.projected else self.source_dim
        if channels != takes:
            raise UnsupportedShape(
                f"cross_attention: {wanted[0]!r} of {name!r} has {channels} channels, and the layer takes {takes}; see "
                "CrossAttentionConfig.source_dim"
            )
        return memory

    def _keys(self, memory: Memory) -> tuple[Tensor, Tensor]:
        if self.config.projected:
            return memory.tensors["k"], memory.tensors["v"]
        kv = self.kv_proj(memory.tensors["x"])
        k, v = kv.unflatten(-1, (2 * self.kv_heads, self.size)).chunk(2, dim=-2)
        return rotary(k, memory.positions, self.config.rope_base) if self.config.rope else k, v
