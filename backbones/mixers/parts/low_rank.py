"""Projections of low rank, which start as constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parameters import mark


class LowRank(nn.Module):
    """bias + W↑ act(W↓ x), where W↓ starts as zeros (RWKV-7, arXiv 2503.14456, section 4).

    The sum with the bias is float32 or wider, for what becomes a decay. W↑ starts orthogonal, and weight decay touches
    neither, as in BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

    Args:
        dim: channels in and out.
        rank: channels between.
        bias: its initial values; None for no bias.
        act: the activation between.
    """

    def __init__(self, dim: int, rank: int, bias: Tensor | None, act: nn.Module):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(dim, rank, bias=False), act, nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1, rank / dim) ** 0.5)
        for layer in (self.down, self.up):
            mark(layer, "weight", decay=False, initialised=True)
        self.bias = None if bias is None else nn.Parameter(bias)
        mark(self, "bias", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.act(self.down(x)))
        return x if self.bias is None else x.to(torch.promote_types(x.dtype, torch.float32)) + self.bias
