"""Choices of blocks as custom ops, for graphs that serve every batch and length.

How a choice is made depends on how many keys there are; a graph that is exported holds it as one step. Lists have as
many columns as a query chooses blocks, whatever there are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..custom import custom_op
from . import lists


def _filled(chosen: Tensor, number: int) -> Tensor:
    return F.pad(chosen, (0, number - chosen.shape[-1]), value=-1).contiguous()


@custom_op("omnimix::blocks_by_mean_key")
def by_mean_key(
    q: Tensor, means: Tensor, positions: Tensor, counts: Tensor | None, block_size: int, number: int, causal: bool
) -> Tensor:
    options = {"block_size": block_size, "number": number, "causal": causal, "counts": counts}
    return _filled(lists.by_mean_key(q, means, positions, **options), number)


@by_mean_key.register_fake
def _(q, means, positions, counts, block_size, number, causal):
    return q.new_empty(*q.shape[:3], number, dtype=torch.int64)


@custom_op("omnimix::blocks_by_compressed_attention")
def by_compressed_attention(
    q: Tensor, keys: Tensor, positions: Tensor, lengths: Tensor | None, size: int, stride: int, block_size: int,
    number: int, blocks: int, first: int, local: int, causal: bool, scale: float | None,
) -> Tensor:  # fmt: skip
    chosen = lists.by_compressed_attention(
        q, keys, positions, size=size, stride=stride, block_size=block_size, number=number, blocks=blocks, first=first,
        local=local, causal=causal, scale=scale, lengths=lengths,
    )  # fmt: skip
    return _filled(chosen, number)


@by_compressed_attention.register_fake
def _(q, keys, positions, lengths, size, stride, block_size, number, blocks, first, local, causal, scale):
    return q.new_empty(*q.shape[:2], keys.shape[2], number, dtype=torch.int64)
