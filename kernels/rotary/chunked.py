"""Rotary positions in few passes over the memory, backward as forward by the negative angle.

Nothing but the angles is kept for the backward pass, x only where they have a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _turn(x: Tensor, angle: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """x by the angle, or `back` by it."""
    wide, r = torch.promote_types(x.dtype, torch.float32), angle.shape[-1]
    # Rows that share their angles, as those of a batch mostly do, have them computed once.
    theta = (angle[:1] if angle.stride(0) == 0 else angle).to(wide)
    turned, cos, sin = x[..., : 2 * r].to(wide), theta.cos(), theta.sin()
    sin = -sin if back else sin
    if interleaved:
        pairs = torch.view_as_complex(turned.contiguous().unflatten(-1, (r, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)
    else:
        first, second, cos, sin = turned[..., :r], turned[..., r:], cos[:, :, None], sin[:, :, None]
        halves = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        turned = torch.cat(halves, dim=-1)
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
        dx = _turn(dy, angle, ctx.interleaved, back=True)
        return dx, None if x is None else _into_angle(x, dx, angle, ctx.interleaved), None


def rotary_chunked(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    return _Rotary.apply(x, angle, interleaved)
