"""Compression of overlapping blocks of keys or values into one each (NSA, arXiv 2502.11089, section 3.3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ....kernels import attention, block_sparse
from ....kernels.common.graphs import for_every_length
from ...layout import Layout, unpack
from ...parameters import mark
from ...state import State
from .kv_cache import last

# Compressed keys and queries that are taken together, where all are seen.
DENSE = 64
# Queries times keys up to which a mask of them all is quicker than lists of blocks.
MASKED = 1 << 20


class Compress(nn.Module):
    """φ of eq. 7: an MLP over the tokens of a block, with embeddings of their places in it; added to their mean, which
    it is at first.

    Args:
        width: channels of a head.
        size: tokens in a block.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(size, width))
        mark(self, "places", decay=False)
        self.up = nn.Linear(size * width, 2 * width)
        # Without a bias, which all keys would share and a softmax would not see.
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "*b l k"]) -> Float[Tensor, "*b k"]:
        return x.mean(-2) + self.down(F.gelu(self.up((x + self.places).flatten(-2))))


def most_compressed(keys: int, size: int, stride: int) -> int:
    """Capacity for the compressed tokens of `keys` tokens.

    One at least, if only to keep the compression within the graph: parameters without gradients halt DDP. torch.export
    would take a comparison for a constraint; it has empty slots at the end instead, which nothing sees.
    """
    return keys // stride + 2 if for_every_length() else max(1, (keys - size) // stride + 1)


def compressed(
    compress: Compress, cache: Tensor, joined: Tensor, position: Tensor, lengths: Tensor, stride: int, room: int
) -> Tensor:
    """The cache of compressed tokens after new ones.

    Args:
        compress: makes one of `size` tokens.
        cache: those before, (n, m, g, d).
        joined: the last `size` - 1 tokens before the new ones, and these, (n, size - 1 + t, g, d).
        position: where the new ones begin, (n,).
        lengths: how many of them each row has, (n,).
        stride: from one block to the next.
        room: compressed tokens in the new cache.
    """
    size = compress.places.shape[0]
    before, t = size - 1, joined.shape[1] - (size - 1)
    # The first block that was not complete, and as many as t tokens can complete.
    first = ((position - size + stride) // stride).clamp(min=0)
    # torch.export would take a comparison, and a single block, for constraints; what is not complete is cut off.
    most = (t - 1) // stride + 2 if for_every_length() else min((t - 1) // stride + 1, room)
    number = first[:, None] + torch.arange(most, device=joined.device)
    start = number * stride - position[:, None] + before
    index = (start[..., None] + torch.arange(size, device=joined.device)).clamp(max=before + t - 1)
    blocks = joined[torch.arange(joined.shape[0], device=joined.device)[:, None, None], index]
    made = compress(blocks.transpose(2, 3))
    complete = number * stride + size <= (position + lengths)[:, None]
    # What is not complete goes into a slot that is cut off.
    number = torch.where(complete, number, room)[..., None, None].expand_as(made)
    dtype = torch.promote_types(cache.dtype, made.dtype)
    grown = F.pad(cache.to(dtype), (0, 0, 0, 0, 0, room + 1 - cache.shape[1]))
    return grown.scatter(1, number, made.to(dtype))[:, :room]


def compressed_rows(
    compress: Iterable[Any], new: dict[str, Tensor], layout: Layout, old: State, stride: int, capacity: int
) -> dict[str, Tensor]:
    """The compressed rows after new tokens, "<name>_coarse", and the last tokens, "<name>_tail", which further ones
    complete.

    Args:
        compress: a `Compress` for each name.
        new: the new tokens' rows by name, (b, t, g, d).
        layout: of the new tokens.
        old: rows of these names before them, and under "chosen" how many tokens there were ("count").
        stride: from one block to the next.
        capacity: compressed tokens after the new ones.
    """
    parts = {}
    for (name, tokens), one in zip(new.items(), compress, strict=True):
        lengths, before = layout.lengths(tokens), one.places.shape[0] - 1
        tokens = tokens if layout.cu_seqlens is None else unpack(tokens, layout.cu_seqlens)
        joined, count = torch.cat([old[f"{name}_tail"], tokens], dim=1), old["chosen"]["count"]
        parts[f"{name}_coarse"] = compressed(one, old[f"{name}_coarse"], joined, count, lengths, stride, capacity)
        parts[f"{name}_tail"] = last(joined, None if layout.cu_seqlens is None else lengths, before)
    return parts


def over_all(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention to all compressed keys up to each query's last one, `seen` (n, t); zeros for queries that see none."""
    # A graph that is exported serves every length.
    if for_every_length() or q.shape[1] * k.shape[1] <= MASKED:
        keys = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
        return attention(q, k, v, q_positions=seen, k_positions=keys)
    every = torch.arange(-(-k.shape[1] // DENSE), device=q.device).expand(1, -(-q.shape[1] // DENSE), 1, -1)
    return block_sparse(q, k, v, every, block_size=DENSE, q_positions=seen)
