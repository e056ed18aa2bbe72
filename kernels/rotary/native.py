"""Rotary positions in C++ (native.cpp), for CPUs: one pass over memory, backwards as forwards by the negative angle."""

import torch
from torch import Tensor

from .. import native
from ..common.tools import accumulate_dtype, unit_stride
from ..custom import custom_op
from .angle import into_angle, of_angle

# Elements of the smallest task for which a thread is worth waking.
SMALLEST = 1 << 15


def rotary_native(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    return (_turn if native.direct(x, angle) else _forward)(x, angle, interleaved)


def _turn(x: Tensor, angle: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    (b, t, h, k), dtype = x.shape, accumulate_dtype(x.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    cos, sin = (a.to(dtype).contiguous().expand(b, -1, -1) for a in of_angle(angle, x.dtype))
    tasks = max(1, min(torch.get_num_threads(), x.numel() // SMALLEST))
    native.call(
        "rotary",
        f"rotary_{native.suffix(dtype)}",
        [unit_stride(x.to(dtype)), cos, sin, y],
        [b, t, h, k, cos.shape[-1], int(interleaved), int(back), tasks],
    )
    return y.to(x.dtype)


@custom_op("omnimix::rotary_native")
def _forward(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    return _turn(x, angle, interleaved)


@_forward.register_fake
def _(x, angle, interleaved):
    return x.new_empty(x.shape)


@custom_op("omnimix::rotary_native_backward")
def _backward(dy: Tensor, x: Tensor | None, angle: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    dx, none = _turn(dy, angle, interleaved, back=True), angle.new_empty(0)
    return dx, none if x is None else into_angle(x, dx, angle.shape[-1], interleaved).to(angle.dtype)


@_backward.register_fake
def _(dy, x, angle, interleaved):
    return dy.new_empty(dy.shape), angle.new_empty(0 if x is None else angle.shape)


def _save(ctx, inputs, output) -> None:
    x, angle, ctx.interleaved = inputs
    # The input matters to the angles' gradient alone.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, angle)


def _differentiate(ctx, dy):
    x, angle = ctx.saved_tensors
    dx, dangle = _backward(dy, x, angle, ctx.interleaved)
    return dx, None if x is None else dangle, None


_forward.register_gradients(_differentiate, _save)
