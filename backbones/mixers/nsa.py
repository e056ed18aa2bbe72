"""Native sparse attention: compressed, selected and near keys (arXiv 2502.11089)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import attention
from ...kernels.block_sparse.lists import by_compressed_attention
from ...kernels.common.graphs import for_every_length
from ..config import MixerConfig, Site, divides, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..layout import repack, unpack
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .parts.chosen_blocks import to_blocks
from .parts.compress import Compress, compressed_rows, most_compressed, over_all
from .parts.kv_cache import DenseCache, WindowCache
from .reference.nsa import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class NSAConfig(MixerConfig):
    """Options of `nsa`, with the paper's values.

    Args:
        heads: query heads, 64 channels each by default.
        kv_heads: heads of keys and values, which divide the query heads and choose for them; one by default.
        size, stride: tokens in a compressed block, and from one to the next.
        block_size: tokens in a selected block; like `size` a multiple of the stride.
        blocks: selected blocks a query; the sequence's first and the `local` last ones always.
        local: blocks up to the query's own that are always selected.
        reach: tokens that the window shows, the query's own included.
        rope_base: of the rotary positions.
    """

    heads: int | None = None
    kv_heads: int = 1
    size: int = 32
    stride: int = 16
    block_size: int = 64
    blocks: int = 16
    local: int = 2
    reach: int = 512
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        positive(self, *(field.name for field in fields(self)))
        divides(self, "stride", self.size, "size")
        divides(self, "stride", self.block_size, "block_size")


@register_mixer(
    "nsa",
    NSAConfig,
    summary="compressed, selected and near keys, gated by head",
    source="arXiv 2502.11089",
    examples=(
        NSAConfig(heads=1, size=4, stride=2, block_size=4, blocks=3, local=1, reach=3),
        NSAConfig(heads=2, kv_heads=1, size=4, stride=4, block_size=4, blocks=2, local=1, reach=2),
    ),
    reference=reference,
)
class NSA(Mixer):
    """Σ gate · attention over three sets of keys, each with projections of its own (eq. 5): blocks compressed by an
    MLP (eq. 7), the blocks that the compressed attention weighs most (eq. 8 to 12), and a window.

    The compressed branch has no rotary positions, but embeddings of the places within its blocks. The choice has no
    gradient. The state holds all keys of the selected branch; of the others compressed keys and the last tokens.
    """

    capabilities = Capabilities(blockwise=False, constant_state=False, reads=frozenset({"positions"}))

    def __init__(self, dim: int, config: NSAConfig, site: Site):
        super().__init__()
        heads = heads_for(dim, config.heads)
        divides(config, "kv_heads", heads, "the query heads")
        self.config, self.size = config, dim // heads
        self.sizes = (dim, *[config.kv_heads * self.size] * 6, 3 * heads)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.compress = nn.ModuleList(Compress(self.size, config.size) for _ in "kv")
        self.out_proj = nn.Linear(dim, dim, bias=False)
        shapes = {name: (config.kv_heads, self.size) for name in "kv"}
        self.chosen, self.near = DenseCache(shapes), WindowCache(shapes, window=config.reach)

    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        layout, causal, config = context.layout, bool(context.layout.causal), self.config
        q, *pairs, gates = self.in_proj(x).split(self.sizes, dim=-1)
        q, *pairs = (s.unflatten(-1, (-1, self.size)) for s in (q, *pairs))
        positions = context.positions_of(x)
        rotated = rotary(q, positions, config.rope_base)
        pairs[2], pairs[4] = (rotary(k, positions, config.rope_base) for k in (pairs[2], pairs[4]))
        coarse, chosen, near = (dict(zip("kv", pairs[i : i + 2], strict=True)) for i in (0, 2, 4))
        bounds, old = layout.cu_seqlens, state
        ranks = layout.positions(x, None if state is None else state["chosen"]["count"])
        # Rows of the batch are sequences where keys are cached; the kernels take packed ones where none are.
        rows, turned, queries = q, rotated, ranks
        if bounds is not None:
            rows, turned, queries = unpack(q, bounds), unpack(rotated, bounds), unpack(ranks, bounds, fill=-1)
        if old is None:
            old = self.init_state(queries.shape[0], device=x.device, dtype=q.dtype)
        blocks_of = self.chosen.grown(chosen, layout, None if state is None else old["chosen"])
        capacity = most_compressed(blocks_of["k"].shape[1], config.size, config.stride)
        compressed = compressed_rows(self.compress, coarse, layout, old, config.stride, capacity)
        o_coarse, blocks = self._coarse(rows, queries, compressed, blocks_of, causal)
        if state is None:
            blocks = blocks if bounds is None or blocks is None else repack(blocks, bounds)
            given: dict[str, Any] = {"causal": causal, "cu_seqlens": bounds}
            o_chosen = to_blocks(rotated, chosen["k"], chosen["v"], blocks, config.block_size, **given)
            o_near = attention(rotated, near["k"], near["v"], window=config.reach, **given)
            kept = self.near.fresh(near, layout) if causal else None
        else:
            o_chosen = to_blocks(turned, blocks_of["k"], blocks_of["v"], blocks, config.block_size, q_positions=queries)
            window = self.near.grown(near, layout, old["near"])
            kept = self.near.kept(window)
            given = {"q_positions": queries, "k_positions": window["ranks"]}
            o_near = attention(turned, window["k"], window["v"], window=config.reach, **given)
        if bounds is not None:
            o_coarse = repack(o_coarse, bounds)
            o_chosen, o_near = (s if state is None else repack(s, bounds) for s in (o_chosen, o_near))
        gates = gates.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().unflatten(-1, (-1, 3))[..., None]
        o = gates[:, :, :, 0] * o_coarse + gates[:, :, :, 1] * o_chosen + gates[:, :, :, 2] * o_near
        after = None if kept is None else State({"chosen": blocks_of, "near": kept, **compressed})
        return Output(self.out_proj(o.to(x.dtype).flatten(-2)), after)

    def _coarse(
        self, q: Tensor, queries: Tensor, compressed: dict[str, Tensor], blocks_of: State, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The compressed branch's output, and the lists of selected blocks; None where there are no more than these."""
        k, v, lengths, config = compressed["k_coarse"], compressed["v_coarse"], blocks_of["count"], self.config
        count, blocks = -(-blocks_of["k"].shape[1] // config.block_size), None
        if for_every_length() or count > config.blocks:
            sizes = {"size": config.size, "stride": config.stride, "block_size": config.block_size}
            choice = sizes | {"number": config.blocks, "local": config.local, "blocks": count}
            blocks = by_compressed_attention(q, k, queries, causal=causal, lengths=lengths, **choice)
        # The last compressed key that is seen: the queries' positions among these.
        seen = ((queries if causal else (lengths - 1)[:, None].expand_as(queries)) - config.size + 1) // config.stride
        return over_all(q, k, v, seen), blocks

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        kind, shape = {"device": device, "dtype": dtype}, (self.config.kv_heads, self.size)
        slots = {"_coarse": 0, "_tail": self.config.size - 1}
        parts = {f"{x}{name}": torch.zeros(batch, n, *shape, **kind) for name, n in slots.items() for x in "kv"}
        return State({"chosen": self.chosen.empty(batch, **kind), "near": self.near.empty(batch, **kind), **parts})
