"""Attention of each query to the blocks of keys that it has chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....kernels import attention, block_sparse


def to_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block_size: int, **options: Any) -> Tensor:
    """Attention to the listed blocks.

    Args:
        q, k, v: queries (b, t, h, d), keys and values (b, s, g, d).
        blocks: a list for each query, as `block_sparse` takes them; None where there are no more blocks than a query
            chooses: it then sees all keys, which plain attention reads faster.
        block_size: keys in a block.
        options: of `block_sparse`.
    """
    if blocks is not None:
        return block_sparse(q, k, v, blocks, block_size=block_size, query_block=1, **options)
    if "q_positions" in options:
        options["k_positions"] = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
    return attention(q, k, v, **options)
