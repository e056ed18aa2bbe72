"""Pairs of channels as complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    wide, r = torch.promote_types(x.dtype, torch.float32), angle.shape[-1]
    turned, rest = x[..., : 2 * r].to(wide), x[..., 2 * r :]
    first, second = turned.unflatten(-1, (r, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    theta = angle.to(wide)[:, :, None]
    z = torch.complex(first, second) * torch.exp(torch.complex(torch.zeros_like(theta), theta))
    turned = torch.stack([z.real, z.imag], dim=-1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
