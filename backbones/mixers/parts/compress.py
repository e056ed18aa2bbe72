"""Compression of overlapping blocks of keys or values into one each (NSA, arXiv 2502.11089, section 3.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...parameters import mark


class Compress(nn.Module):
    """φ of eq. 7: an MLP over the tokens of a block, with embeddings of their places in it; added to their mean, which
    it is at first.

    Args:
        width: channels of a head.
        size: tokens in a block.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.places = mark(nn.Parameter(torch.zeros(size, width)), decay=False)
        self.up = nn.Linear(size * width, 2 * width)
        # Without a bias, which all keys would share and a softmax would not see.
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "*b l k"]) -> Float[Tensor, "*b k"]:
        return x.mean(-2) + self.down(F.gelu(self.up((x + self.places).flatten(-2))))


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
    number = first[:, None] + torch.arange(min((t - 1) // stride + 1, room), device=joined.device)
    start = number * stride - position[:, None] + before
    index = (start[..., None] + torch.arange(size, device=joined.device)).clamp(max=before + t - 1)
    blocks = joined[torch.arange(len(joined), device=joined.device)[:, None, None], index]
    made = compress(blocks.transpose(2, 3))
    complete = number * stride + size <= (position + lengths)[:, None]
    # What is not complete goes into a slot that is cut off.
    number = torch.where(complete, number, room)[..., None, None].expand_as(made)
    dtype = torch.promote_types(cache.dtype, made.dtype)
    grown = F.pad(cache.to(dtype), (0, 0, 0, 0, 0, room + 1 - cache.shape[1]))
    return grown.scatter(1, number, made.to(dtype))[:, :room]
