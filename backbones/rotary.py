"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary(
    x: Float[Tensor, "b t h k"], positions: Int[Tensor, "b t"], base: float = 10_000.0
) -> Float[Tensor, "b t h k"]:
    """Turn each pair (x_i, x_{i + k/2}) by the angle position · base^(-2i/k); the angles are float32 or wider.

    An odd last channel stays as it is.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (positions.to(wide)[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
