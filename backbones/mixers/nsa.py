"""Native sparse attention: compressed, selected and near keys (arXiv 2502.11089)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ...kernels import attention, block_sparse
from ...kernels.block_sparse.lists import by_compressed_attention
from ..config import MixerConfig, Site, divides, positive
from ..layout import Layout, repack, unpack
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .cache import extended, last
from .compress import Compress, compressed
from .registry import register_mixer

# Compressed keys and queries that are taken together, where all are seen.
DENSE = 64


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
)
class NSA(Mixer):
    """Σ gate · attention over three sets of keys, each with projections of its own (eq. 5): blocks compressed by an
    MLP (eq. 7), the blocks on which the compressed attention looks (eq. 8 to 12), and a window.

    The compressed branch has no rotary positions, but embeddings of the places within its blocks. The choice has no
    gradient. The state holds all keys of the selected branch; of the others compressed keys and the last tokens.
    """

    bidirectional = True
    constant_state = False

    def __init__(self, dim: int, config: NSAConfig, site: Site):
        super().__init__()
        heads = heads_for(dim, config.heads)
        divides(config, "kv_heads", heads, "the query heads")
        self.config, self.size, self.kv_heads = config, dim // heads, config.kv_heads
        self.sizes = (dim, *[config.kv_heads * self.size] * 6, 3 * heads)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.compress = nn.ModuleList(Compress(self.size, config.size) for _ in "kv")
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        q, *pairs, gates = self.in_proj(x).split(self.sizes, dim=-1)
        q, *pairs = (s.unflatten(-1, (-1, self.size)) for s in (q, *pairs))
        places = layout.positions(x, None if state is None else state["position"])
        turned = rotary(q, places, self.config.rope_base)
        pairs[2], pairs[4] = (rotary(k, places, self.config.rope_base) for k in (pairs[2], pairs[4]))
        # Rows of the batch are sequences from here on; the kernels take packed ones where nothing is cached.
        borders = layout.cu_seqlens
        rows = [q, turned, *pairs] if borders is None else [unpack(s, borders) for s in (q, turned, *pairs)]
        queries = places if borders is None else unpack(places, borders, fill=-1)
        old = state or self.init_state(len(queries), device=x.device, dtype=pairs[0].dtype)
        new = self._extend(rows[2:], layout.lengths(places), old)
        coarse, blocks = self._coarse(rows[0], queries, new, causal := bool(layout.causal))
        rows_of_one = {"block_size": self.config.block_size, "query_block": 1}
        if state is None:
            blocks, options = blocks if borders is None else repack(blocks, borders), {"cu_seqlens": borders}
            chosen = block_sparse(turned, *pairs[2:4], blocks, causal=causal, **rows_of_one, **options)
            near = attention(turned, *pairs[4:6], causal=causal, window=self.config.reach, **options)
        else:
            chosen = block_sparse(rows[1], new["k"], new["v"], blocks, q_positions=queries, **rows_of_one)
            near = self._near(rows[1], rows[6:], queries, old)
        if borders is not None:
            coarse = repack(coarse, borders)
            chosen, near = (s if state is None else repack(s, borders) for s in (chosen, near))
        gates = gates.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().unflatten(-1, (-1, 3))[..., None]
        o = sum(gates[:, :, :, i] * branch for i, branch in enumerate((coarse, chosen, near)))
        return self.out_proj(o.to(x.dtype).flatten(-2)), new if causal else None

    def _extend(self, pairs: list[Tensor], lengths: Tensor, old: State) -> State:
        """The state after the tokens of `pairs`, keys and values of the three branches (n, t, g, d)."""
        (size, stride, reach), position = (self.config.size, self.config.stride, self.config.reach), old["position"]
        new = {"k": extended(old["k"], pairs[2], position), "v": extended(old["v"], pairs[3], position)}
        # One at least, if only to keep the compression within the graph: parameters without gradients halt DDP.
        room = max(1, (new["k"].shape[1] - size) // stride + 1)
        for name, tokens, near, compress in zip("kv", pairs[:2], pairs[4:], self.compress, strict=True):
            joined = torch.cat([old[f"{name}_tail"], tokens], dim=1)
            coarse = compressed(compress, old[f"{name}_coarse"], joined, position, lengths, stride, room)
            new |= {f"{name}_coarse": coarse, f"{name}_tail": last(joined, lengths, size - 1)}
            new[f"{name}_near"] = last(torch.cat([old[f"{name}_near"], near], dim=1), lengths, reach - 1)
        return State(new | {"position": position + lengths})

    def _coarse(self, q: Tensor, queries: Tensor, new: State, causal: bool) -> tuple[Tensor, Tensor]:
        """The compressed branch's output, and the lists of selected blocks."""
        k, v, lengths, config = new["k_coarse"], new["v_coarse"], new["position"], self.config
        count = -(-new["k"].shape[1] // config.block_size)
        sizes = {"size": config.size, "stride": config.stride, "block_size": config.block_size}
        choice = sizes | {"number": config.blocks, "local": config.local, "blocks": count}
        blocks = by_compressed_attention(q, k, queries, causal=causal, lengths=lengths, **choice)
        # The last compressed key that is seen: the queries' positions among these.
        seen = ((queries if causal else (lengths - 1)[:, None].expand_as(queries)) - config.size + 1) // config.stride
        every = torch.arange(-(-k.shape[1] // DENSE), device=q.device).expand(1, -(-q.shape[1] // DENSE), 1, -1)
        return block_sparse(q, k, v, every, block_size=DENSE, q_positions=seen), blocks

    def _near(self, q: Tensor, pair: list[Tensor], queries: Tensor, old: State) -> Tensor:
        k, v = (torch.cat([old[f"{name}_near"], s], dim=1) for name, s in zip("kv", pair, strict=True))
        slots = torch.arange(k.shape[1], device=k.device) + old["position"][:, None] - (self.config.reach - 1)
        return attention(q, k, v, window=self.config.reach, q_positions=queries, k_positions=slots)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        slots = {"": 0, "_coarse": 0, "_tail": self.config.size - 1, "_near": self.config.reach - 1}
        shape, kind = (self.kv_heads, self.size), {"device": device, "dtype": dtype}
        parts = {f"{x}{name}": torch.zeros(batch, n, *shape, **kind) for name, n in slots.items() for x in "kv"}
        return State(parts | {"position": torch.zeros(batch, device=device, dtype=torch.int64)})
