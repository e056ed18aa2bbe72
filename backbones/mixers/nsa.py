"""Native sparse attention: compressed, selected and near keys (arXiv 2502.11089)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import attention, block_sparse
from ...kernels.block_sparse.lists import by_compressed_attention
from ..config import MixerConfig, Site, positive
from ..layout import Layout, repack, unpack
from ..rotary import rotary
from ..state import State
from .base import Mixer, heads_for
from .cache import extended, last
from .compress import Compress, compressed
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class NSAConfig(MixerConfig):
    """Options of `nsa`, with the paper's values.

    Args:
        heads: query heads, 64 channels each by default.
        kv_heads: heads of keys and values, which divide the query heads and choose for them; one by default.
        size, stride: tokens in a compressed block, a multiple of the stride from one to the next.
        block_size: tokens in a selected block, a multiple of the stride too.
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
        positive(self, "heads", "kv_heads", "size", "stride", "block_size", "blocks", "local", "reach", "rope_base")
        for name in ("size", "block_size"):
            if getattr(self, name) % self.stride:
                raise ConfigError(f"NSAConfig.{name} is {getattr(self, name)}; it must be a multiple of the stride")


@register_mixer(
    "nsa",
    NSAConfig,
    summary="compressed, selected and near keys, gated by head",
    source="arXiv 2502.11089",
    examples=(
        NSAConfig(heads=2, size=4, stride=2, block_size=4, blocks=3, local=1, reach=3),
        NSAConfig(heads=4, kv_heads=2, size=4, stride=4, block_size=4, blocks=2, local=1, reach=2),
    ),
)
class NSA(Mixer):
    """Σ gate · attention over three sets of keys, each with projections of its own (eq. 5): blocks compressed by an
    MLP (eq. 7), the blocks on which the compressed attention looks (eq. 8 to 12), and a window.

    The compressed branch has no rotary positions: its blocks carry embeddings of the places within them. The choice has
    no gradient. The state holds all keys of the selected branch; of the others compressed keys and the last tokens.
    """

    bidirectional = True
    constant_state = False

    def __init__(self, dim: int, config: NSAConfig, site: Site):
        super().__init__()
        heads = heads_for(dim, config.heads)
        if heads % config.kv_heads:
            raise ConfigError(f"kv_heads is {config.kv_heads}; it must divide the {heads} query heads")
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
        lengths = layout.lengths(places)
        old = self.init_state(len(lengths), device=x.device, dtype=pairs[0].dtype) if state is None else state
        new = self._extend(rows[2:], lengths, old)
        coarse, blocks = self._coarse(rows[0], queries, new, bool(layout.causal))
        if state is None:
            blocks = blocks if borders is None else repack(blocks, borders)
            options = {"causal": bool(layout.causal), "cu_seqlens": borders}
            chosen = self._sparse(turned, *pairs[2:4], blocks, **options)
            near = attention(turned, *pairs[4:6], window=self.config.reach, **options)
        else:
            chosen = self._sparse(rows[1], new["k"], new["v"], blocks, q_positions=queries)
            near = self._near(rows[1], rows[6:], queries, old)
        if borders is not None:
            coarse = repack(coarse, borders)
            chosen, near = (s if state is None else repack(s, borders) for s in (chosen, near))
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = gates.to(wide).sigmoid().unflatten(-1, (-1, 3))[..., None]
        o = sum(weights[:, :, :, i] * branch.to(wide) for i, branch in enumerate((coarse, chosen, near)))
        return self.out_proj(o.to(x.dtype).flatten(-2)), new if layout.causal else None

    def _extend(self, pairs: list[Tensor], lengths: Tensor, old: State) -> State:
        """The state after the tokens of `pairs`, keys and values of the three branches (n, t, g, d)."""
        (size, stride, reach), position = (self.config.size, self.config.stride, self.config.reach), old["position"]
        new = {"k": extended(old["k"], pairs[2], position), "v": extended(old["v"], pairs[3], position)}
        room = max(0, (new["k"].shape[1] - size) // stride + 1)
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
        if not k.shape[1]:
            return torch.zeros_like(q), blocks
        # A compressed block counts as standing at its last token; there it becomes visible.
        ends = torch.arange(k.shape[1], device=k.device) * config.stride + config.size - 1
        ends = torch.where(ends < lengths[:, None], ends, -1)
        return attention(q, k, v, causal=causal, q_positions=queries, k_positions=ends), blocks

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, **options) -> Tensor:
        return block_sparse(q, k, v, blocks, block_size=self.config.block_size, query_block=1, **options)

    def _near(self, q: Tensor, pair: list[Tensor], queries: Tensor, old: State) -> Tensor:
        k, v = (torch.cat([old[f"{name}_near"], s], dim=1) for name, s in zip("kv", pair, strict=True))
        slots = torch.arange(k.shape[1], device=k.device) + old["position"][:, None] - (self.config.reach - 1)
        return attention(q, k, v, window=self.config.reach, q_positions=queries, k_positions=slots)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        slots = {"": 0, "_coarse": 0, "_tail": self.config.size - 1, "_near": self.config.reach - 1}
        parts = {
            f"{name}{kind}": torch.zeros(batch, count, self.kv_heads, self.size, device=device, dtype=dtype)
            for kind, count in slots.items()
            for name in "kv"
        }
        return State(parts | {"position": torch.zeros(batch, device=device, dtype=torch.int64)})
