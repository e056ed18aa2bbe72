"""The logarithm of a sigmoid: of gates that are products over time."""

from __future__ import annotations

import torch
from torch import Tensor


def log_sigmoid(x: Tensor) -> Tensor:
    """Take log σ(x) in float32 or wider; several times as fast as torch's, whose log1p is not vectorised on CPUs."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Below -80 it is x to the last bit, and σ(x) would underflow.
    return x.clamp(min=-80).sigmoid().log() + (x + 80).clamp(max=0)
