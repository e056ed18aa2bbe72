"""Pairs of channels, rotated one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    wide, r = torch.promote_types(x.dtype, torch.float32), angle.shape[-1]
    turned, rest = x[..., : 2 * r].to(wide), x[..., 2 * r :]
    first, second = turned.unflatten(-1, (r, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    theta = angle.to(wide)[:, :, None]
    # (x₁ + i x₂) e^{i θ} by its parts: other runtimes have no complex numbers.
    real, imaginary = (
        first * theta.cos() - second * theta.sin(),
        first * theta.sin() + second * theta.cos(),
    )
    parts = [real, imaginary]
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
