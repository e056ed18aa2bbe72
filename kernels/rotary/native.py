"""Rotary positions in C++ (native.cpp), for CPUs: one pass over memory, backwards as forwards by the negative angle."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..common.tools import unit_stride
from .chunked import of_angle

# Elements of the smallest task for which a thread is worth waking.
SMALLEST = 1 << 15


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    b, t, h, k = x.shape
    y = x.new_empty(x.shape)
    tasks = max(1, min(torch.get_num_threads(), x.numel() // SMALLEST))
    cos, sin = (a.contiguous().expand(b, -1, -1) for a in (cos, sin))
    native.call(
        "rotary",
        f"rotary_{native.suffix(x.dtype)}",
        [unit_stride(x), cos, sin, y],
        [b, t, h, k, cos.shape[-1], int(interleaved), int(back), tasks],
    )
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, back):
        ctx.save_for_backward(cos, sin)
        ctx.options = interleaved, back
        return _turn(x, cos, sin, interleaved, back)

    @staticmethod
    def backward(ctx, dy):
        interleaved, back = ctx.options
        return _Rotary.apply(dy, *ctx.saved_tensors, interleaved, not back), None, None, None, None


def rotary_native(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    cos, sin = of_angle(angle.detach(), x.dtype)
    return _Rotary.apply(x, cos, sin, interleaved, False)
