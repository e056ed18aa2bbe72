"""Rotary positions in few passes over the memory, backward as forward by the negative angle.

Nothing but the angles is kept for the backward pass, x only where they have a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _turn(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    wide, r = torch.promote_types(x.dtype, torch.float32), angle.shape[-1]
    turned, theta = x[..., : 2 * r].to(wide), angle.to(wide)
    cos, sin = theta.cos(), theta.sin()
    if interleaved:
        pairs = torch.view_as_complex(turned.contiguous().unflatten(-1, (r, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], dim=-1)[:, :, None], torch.cat([-sin, sin], dim=-1)[:, :, None]
        turned = torch.addcmul(turned * cos, turned.roll(r, dims=-1), sin)
    turned = turned.to(x.dtype)
    return turned if x.shape[-1] == 2 * r else torch.cat([turned, x[..., 2 * r :]], dim=-1)


def _into_angle(x: Tensor, dx: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """The angles' gradient: that of a turn is a quarter turn, and x and dx are as their images turned together."""
    wide, r = torch.promote_types(x.dtype, torch.float32), angle.shape[-1]
    x, dx = x[..., : 2 * r].to(wide), dx[..., : 2 * r].to(wide)
    if interleaved:
        found = dx[..., 1::2] * x[..., ::2] - dx[..., ::2] * x[..., 1::2]
    else:
        found = dx[..., r:] * x[..., :r] - dx[..., :r] * x[..., r:]
    return found.sum(2).to(angle.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, angle, interleaved):
        ctx.interleaved = interleaved
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, angle)
        return _turn(x, angle, interleaved)

    @staticmethod
    def backward(ctx, dy):
        x, angle = ctx.saved_tensors
        dx = _turn(dy, -angle, ctx.interleaved)
        return dx, None if x is None else _into_angle(x, dx, angle, ctx.interleaved), None


def rotary_chunked(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    return _Rotary.apply(x, angle, interleaved)
