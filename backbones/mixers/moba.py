"""Mixture of block attention: each query chooses its blocks of keys (arXiv 2502.13189)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.block_sparse.lists import by_mean_key
from ...kernels.common.graphs import for_every_length
from ..config import Site, positive
from ..layer import Capabilities
from ..layout import Layout, repack, unpack
from ..state import State
from .attention import Attention, AttentionConfig
from .parts.chosen_blocks import to_blocks
from .parts.kv_cache import DenseCache
from .reference.moba import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class MoBAConfig(AttentionConfig):
    """Options of `moba`: those of `attention`, and

    Args:
        block_size: keys in a block.
        top_k: blocks that a query of a head sees, its own included.
    """

    block_size: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "block_size", "top_k")


@register_mixer(
    "moba",
    MoBAConfig,
    summary="attention to the blocks whose mean keys suit the query best",
    source="arXiv 2502.13189",
    examples=(
        MoBAConfig(heads=2, block_size=4, top_k=3),
        MoBAConfig(heads=2, kv_heads=1, rope=False, qk_norm=True, gate=True, block_size=3, top_k=2),
    ),
    reference=reference,
)
class MoBA(Attention):
    """Attention to a query's own block and to the `top_k` - 1 blocks with the highest q · mean(k) (eq. 5 to 7).

    The choice has no gradient; bidirectional, it is made among all blocks. The state holds every key and value.
    """

    # A layout's blocks need not be those from which queries choose.
    capabilities = Capabilities(blockwise=False, constant_state=False)

    def __init__(self, dim: int, config: MoBAConfig, site: Site):
        super().__init__(dim, config, site)
        self.block_size, self.top_k = config.block_size, config.top_k

    def make_cache(self, shapes: dict[str, tuple[int, int]]) -> DenseCache:
        return DenseCache(shapes)

    def attend(
        self, q: Tensor, rows: dict[str, Tensor], layout: Layout, state: State | None
    ) -> tuple[Tensor, State | None]:
        boundaries, causal = layout.cu_seqlens, bool(layout.causal)
        ranks = layout.positions(q, None if state is None else state["count"])
        grown = self.cache.grown(rows, layout, state)
        per_row, queries = q, ranks
        if boundaries is not None:
            per_row, queries = unpack(q, boundaries), unpack(ranks, boundaries, fill=-1)
        keys, count = grown["k"], grown["count"]
        blocks = None
        # A graph that is exported serves every length.
        if for_every_length() or keys.shape[1] > self.top_k * self.block_size:
            blocks = by_mean_key(
                per_row,
                self._means(keys, count),
                queries,
                block_size=self.block_size,
                number=self.top_k,
                causal=causal,
                counts=None if causal else (count + self.block_size - 1) // self.block_size,
            )
        if state is None:
            blocks = blocks if boundaries is None or blocks is None else repack(blocks, boundaries)
            o = to_blocks(q, rows["k"], rows["v"], blocks, self.block_size, causal=causal, cu_seqlens=boundaries)
        else:
            o = to_blocks(per_row, keys, grown["v"], blocks, self.block_size, q_positions=queries)
            o = o if boundaries is None else repack(o, boundaries)
        return o, grown if causal else None

    def _means(self, keys: Tensor, lengths: Tensor) -> Tensor:
        """The mean key of each block, (n, m, g, d); of one that is not full, of the keys that it has."""
        # torch.export would take a single block for a constraint; an empty one is never chosen.
        count = -(-keys.shape[1] // self.block_size) + int(for_every_length())
        keys = F.pad(keys, (0, 0, 0, 0, 0, count * self.block_size - keys.shape[1])).unfold(
            1, self.block_size, self.block_size
        )
        start = torch.arange(count, device=keys.device) * self.block_size
        filled = (lengths[:, None] - start).clamp(1, self.block_size)[..., None, None]
        return keys.sum(-1, dtype=torch.promote_types(keys.dtype, torch.float32)) / filled
