"""Parameters that start as zeros make laws vacuous: behind them nothing has an effect or a gradient."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def without_zeros(module: M) -> M:
    """The module, whose parameters that are all zeros now have small normal values."""
    for p in module.parameters():
        if not p.any():
            p.normal_(std=0.02)
    return module
