"""Angles of rotary positions: their cosines and sines, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def of_angle(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine; rows that share their angles, as those of a batch mostly do, have them computed once."""
    theta = (angle[:1] if angle.stride(0) == 0 else angle).to(torch.promote_types(dtype, torch.float32))
    return theta.cos(), theta.sin()


def into_angle(x: Tensor, dx: Tensor, r: int, interleaved: bool) -> Tensor:
    """The angles' gradient: that of a turn is a quarter turn, and x and dx are as their images turned together."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dx = x[..., : 2 * r].to(wide), dx[..., : 2 * r].to(wide)
    if interleaved:
        found = dx[..., 1::2] * x[..., ::2] - dx[..., ::2] * x[..., 1::2]
    else:
        found = dx[..., r:] * x[..., :r] - dx[..., :r] * x[..., r:]
    return found.sum(2)
