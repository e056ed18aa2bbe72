"""Mixture of block attention by its paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import finished, projected
from .common import attend


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    Attention of a query to the blocks with the highest ⟨q, mean pool(K[I_i])⟩ (MoBA, arXiv 2502.13189, eq. 5 and 6).

    Blocks ahead of the query have the score −∞, the query's own block is always among the k that are chosen, and
    attention within it is causal (section 2.2). Bidirectional, which the paper does not have, all blocks can be chosen.
    """
    q, k, v, gate = projected(mixer, config, x)
    b, t, h, _ = q.shape
    share, size = h // k.shape[2], config.block_size
    pooled = torch.stack([block.mean(1) for block in k.split(size, dim=1)], 1)
    seen = torch.zeros(b, h, t, t, dtype=torch.bool)
    for row in range(b):
        for head in range(h):
            for i in range(t):
                own = i // size
                scores = pooled[row, :, head // share] @ q[row, i, head]
                others = [n for n in range(len(scores)) if n < own or (not causal and n > own)]
                others.sort(key=lambda n: -scores[n].item())
                for n in (own, *others[: config.top_k - 1]):
                    seen[row, head, i, n * size : (n + 1) * size] = True
                if causal:
                    seen[row, head, i, i + 1 :] = False
    return finished(mixer, config, attend(q, k, v, seen), gate)
