"""Heads of length 1."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ....kernels import norm

# For keys that have length 1 however short they are (RWKV-7, as torch.nn.functional.normalize).
LENGTH_EPS = 1e-12


def unit(x: Float[Tensor, "b t d"], heads: int, eps: float = 1e-6) -> Float[Tensor, "b t h k"]:
    """Split `x` (b, t, h · k) into heads, each of length 1: x / √(Σ x² + eps)."""
    # torch.jit.trace would make tensors of sizes.
    size = int(x.shape[-1]) // heads
    # An RMS of size ** -0.5 is a length of 1.
    weight = torch.full((x.shape[-1],), size**-0.5, dtype=x.dtype, device=x.device)
    return norm(x, weight, groups=heads, eps=eps / size).unflatten(-1, (heads, -1))
