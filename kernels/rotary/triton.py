"""Triton kernel of `rotary`, the same forward and backward.

For n tokens of h heads, k channels and r pairs, in elements of s bytes, a forward moves n · (2 s · h · k + 8 r) bytes
(cosine and sine are torch's, which computes them once for all heads: those of the GPU's libraries need a stack), a
backward n · 4 r more, and n · s · h · k where the angles have a gradient. About three operations a channel, hence less
than one a byte: bound by the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import accumulate_dtype, grid, launches, on_device_of, unit_stride
from ..custom import custom_op

# Elements of a program's tile.
TILE = 1024


@triton.jit
def _turn_kernel(
    x, cos, sin, y, other, into_angle, x_strides, other_strides, length, tokens, H, K, R,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y = x turned; with `other`, which x is the gradient of, also the angles' gradient. Program: tokens, all heads."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    pair = tl.arange(0, BR)
    inside = (token < tokens)[:, None] & (pair < R)[None, :]
    at = token[:, None] * R + pair[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0).to(ACC)
    s = tl.load(sin + at, mask=inside, other=0.0).to(ACC)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + R
    row, step = token // length, token % length
    x += (row * x_strides[0] + step * x_strides[1])[:, None]
    y += (token * H * K)[:, None]
    if other is not None:
        other += (row * other_strides[0] + step * other_strides[1])[:, None]
        total = tl.zeros((BT, BR), ACC)
    for head in range(H):
        a = tl.load(x + head * x_strides[2] + first[None, :], mask=inside, other=0.0).to(ACC)
        b = tl.load(x + head * x_strides[2] + second[None, :], mask=inside, other=0.0).to(ACC)
        u, v = a * c - b * s, b * c + a * s
        tl.store(y + head * K + first[None, :], u.to(y.dtype.element_ty), mask=inside)
        tl.store(y + head * K + second[None, :], v.to(y.dtype.element_ty), mask=inside)
        if other is not None:
            p = tl.load(other + head * other_strides[2] + first[None, :], mask=inside, other=0.0).to(ACC)
            q = tl.load(other + head * other_strides[2] + second[None, :], mask=inside, other=0.0).to(ACC)
            total += v * p - u * q
    if other is not None:
        tl.store(into_angle + at, total.to(into_angle.dtype.element_ty), mask=inside)


def _turn(x: Tensor, angle: Tensor, interleaved: bool, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """x turned, and the angles' gradient where `other` is given."""
    (b, t, h, k), r = x.shape, angle.shape[2]
    wide = accumulate_dtype(x.dtype)
    theta = angle.to(wide)
    x, other = unit_stride(x), None if other is None else unit_stride(other)
    y = x.new_empty(x.shape)
    if k > 2 * r:
        y[..., 2 * r :] = x[..., 2 * r :]
    into_angle = angle.new_empty(angle.shape if other is not None else 0)
    pairs = triton.next_power_of_2(r)
    block = max(1, TILE // pairs)
    with on_device_of(x):
        _turn_kernel[grid(triton.cdiv(b * t, block))](
            x, theta.cos().contiguous(), theta.sin().contiguous(), y, other, into_angle, x.stride()[:3],
            (0, 0, 0) if other is None else other.stride()[:3], t, b * t, h, k, r,
            INTERLEAVED=interleaved, ACC=tl.float64 if wide == torch.float64 else tl.float32, BT=block, BR=pairs,
            num_warps=4,
        )  # fmt: skip
    return y, into_angle


def _launch_forward(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    return _turn(x, angle, interleaved, None)[0]


def _launch_backward(dy: Tensor, x: Tensor | None, angle: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _turn(dy, -angle, interleaved, x)


@custom_op("omnimix::rotary_triton")
def _forward(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    return _launch_forward(x, angle, interleaved)


@_forward.register_fake
@launches(_launch_forward)
def _(x, angle, interleaved):
    return x.new_empty(x.shape)


@custom_op("omnimix::rotary_triton_backward")
def _backward(dy: Tensor, x: Tensor | None, angle: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _launch_backward(dy, x, angle, interleaved)


@_backward.register_fake
@launches(_launch_backward)
def _(dy, x, angle, interleaved):
    return dy.new_empty(dy.shape), angle.new_empty(0 if x is None else angle.shape)


def _save(ctx, inputs, output) -> None:
    x, angle, ctx.interleaved = inputs
    # x is kept only where the angles have a gradient.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, angle)


def _differentiate(ctx, dy):
    x, angle = ctx.saved_tensors
    dx, dangle = torch.ops.omnimix.rotary_triton_backward(dy.contiguous(), x, angle, ctx.interleaved)
    return dx, None if x is None else dangle, None


_forward.register_gradients(_differentiate, _save)


def rotary_triton(*, x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """See `omnimix.kernels.rotary`."""
    return torch.ops.omnimix.rotary_triton(x, angle, interleaved)
