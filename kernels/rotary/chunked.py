"""Rotary positions in few passes over the memory, backward as forward by the negative angle.

Only the angles' cosines and sines are kept for the backward pass; x and the angles where these have a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...utils.modes import transforming
from .angle import into_angle, of_angle


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    r = cos.shape[-1]
    turned = x[..., : 2 * r].to(cos.dtype)
    if interleaved:
        pairs = torch.view_as_complex(turned.contiguous().unflatten(-1, (r, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)
    else:
        first, second, cos, sin = turned[..., :r], turned[..., r:], cos[:, :, None], sin[:, :, None]
        halves = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        turned = torch.cat(halves, dim=-1)
    turned = turned.to(x.dtype)
    return turned if x.shape[-1] == 2 * r else torch.cat([turned, x[..., 2 * r :]], dim=-1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, angle, interleaved):
        cos, sin = of_angle(angle, x.dtype)
        ctx.interleaved, ctx.dtype = interleaved, angle.dtype
        # Learned angles themselves, so that a second derivative reaches them.
        ctx.save_for_backward(*((x, angle) if ctx.needs_input_grad[1] else (cos, sin)))
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dy):
        if not ctx.needs_input_grad[1]:
            cos, sin = ctx.saved_tensors
            return _turn(dy, cos, -sin, ctx.interleaved), None, None
        x, angle = ctx.saved_tensors
        cos, sin = of_angle(angle, dy.dtype)
        dx = _turn(dy, cos, -sin, ctx.interleaved)
        return dx, into_angle(x, dx, cos.shape[-1], ctx.interleaved).to(ctx.dtype), None


def rotary_chunked(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    if transforming():
        return _turn(x, *of_angle(angle, x.dtype), interleaved)
    return _Rotary.apply(x, angle, interleaved)
