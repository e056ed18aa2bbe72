"""Mamba-2's decay, for other mixers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parameters import mark


class StepDecay(nn.Module):
    """Mamba-2's decay (arXiv 2405.21060): log α = −A softplus(x + bias), with A uniform and the steps log-uniform.

    Args:
        heads: each has its A.
        channels: each has its bias; a multiple of the heads.
        least: the smallest A at the start; the largest is 16.
    """

    def __init__(self, heads: int, channels: int, least: float = 1.0):
        super().__init__()
        steps = torch.exp(torch.empty(channels).uniform_(math.log(1e-3), math.log(0.1)))
        # What softplus turns into these steps.
        self.bias = nn.Parameter(steps.expm1().log())
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(least, 16).log())
        mark(self, "bias", "log_rate", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, t, channels)` -> `(b, t, h, channels / h)`"""
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = F.softplus(x.to(wide) + self.bias).unflatten(-1, (self.log_rate.shape[0], -1))
        return steps * -self.log_rate.to(wide).exp()[:, None]
