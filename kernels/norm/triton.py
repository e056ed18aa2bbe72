"""Triton kernels of `norm`: each program normalises whole slices in registers.

The backward kernel computes the statistics again rather than load them. Its programs go through the rows in strides and
each writes one partial sum of the weight's gradient, so that nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import accumulate_dtype, grid, launches, on_device_of
from ..custom import custom_op

# Elements of a program's tile; a wider slice makes a tile of its own.
TILE = 2048
# Programs of the backward kernel per group, hence partial sums of the weight's gradient.
PROGRAMS = 512


@triton.jit
def _activate(z, SILU: tl.constexpr):
    """The activation and its derivative."""
    s = 1 / (1 + tl.exp(-z))
    if SILU:
        return z * s, s * (1 + z * (1 - s))
    else:
        return s, s * (1 - s)


@triton.jit
def _forward_kernel(
    x, gate, weight, y, x_stride, gate_stride, rows, eps,
    D: tl.constexpr, SIZE: tl.constexpr, SILU: tl.constexpr, NORM_FIRST: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None]
    column = tl.arange(0, BD)[None, :]
    inside = (row < rows) & (column < SIZE)
    column += tl.program_id(1) * SIZE
    u = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(ACC)
    if gate is not None:
        a, _ = _activate(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(ACC), SILU)
        if not NORM_FIRST:
            u *= a
    u /= tl.sqrt(tl.sum(u * u, 1) / SIZE + eps)[:, None]
    if weight is not None:
        u *= tl.load(weight + column, mask=inside, other=0.0).to(ACC)
    if gate is not None:
        if NORM_FIRST:
            u *= a
    tl.store(y + row * D + column, u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, x, gate, weight, dx, dgate, dweight, x_stride, gate_stride, rows, blocks, eps,
    D: tl.constexpr, SIZE: tl.constexpr, SILU: tl.constexpr, NORM_FIRST: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, BD)[None, :]
    column = local + tl.program_id(1) * SIZE
    if weight is not None:
        w = tl.load(weight + column, mask=local < SIZE, other=0.0).to(ACC)
        into_w = tl.zeros([BD], dtype=ACC)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        row = ((tl.zeros([BR], dtype=tl.int64) + block) * BR + tl.arange(0, BR))[:, None]
        inside = (row < rows) & (local < SIZE)
        u = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(ACC)
        g = tl.load(dy + row * D + column, mask=inside, other=0.0).to(ACC)
        if gate is not None:
            z = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(ACC)
            a, da = _activate(z, SILU)
            if not NORM_FIRST:
                da *= u
                u *= a
        factor = 1 / tl.sqrt(tl.sum(u * u, 1) / SIZE + eps)[:, None]
        u *= factor
        if gate is not None:
            if NORM_FIRST:
                da *= g * u
                g *= a
        if weight is not None:
            into_w += tl.sum(g * u, 0)
            g *= w
            if gate is not None:
                if NORM_FIRST:
                    da *= w
        into_x = factor * (g - u * (tl.sum(g * u, 1) / SIZE)[:, None])
        if gate is not None:
            if not NORM_FIRST:
                da *= into_x
                into_x *= a
            tl.store(dgate + row * D + column, da.to(dgate.dtype.element_ty), mask=inside)
        tl.store(dx + row * D + column, into_x.to(dx.dtype.element_ty), mask=inside)
    if weight is not None:
        first = tl.program_id(0).to(tl.int64) * D + tl.program_id(1) * SIZE + tl.arange(0, BD)
        tl.store(dweight + first, into_w, mask=tl.arange(0, BD) < SIZE)


class _Call:
    """What the launches of one call share."""

    def __init__(self, x: Tensor, gate: Tensor | None, weight: Tensor | None, groups: int):
        self.width = x.shape[-1]
        self.groups = groups
        self.x, self.gate = self._rows(x), None if gate is None else self._rows(gate)
        self.weight = None if weight is None else weight.contiguous()
        self.tile = triton.next_power_of_2(self.width // groups)
        self.block = max(1, TILE // self.tile)
        self.blocks = triton.cdiv(self.x.shape[0], self.block)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.width)
        return x if self.width == 1 or x.stride(1) == 1 else x.contiguous()

    def common(self, silu: bool, norm_first: bool, eps: float) -> dict[str, object]:
        return {
            "x_stride": self.x.stride(0),
            "gate_stride": 0 if self.gate is None else self.gate.stride(0),
            "rows": self.x.shape[0],
            "eps": eps,
            "D": self.width,
            "SIZE": self.width // self.groups,
            "SILU": silu,
            "NORM_FIRST": norm_first,
            "ACC": tl.float64 if self.x.dtype == torch.float64 else tl.float32,
            "BR": self.block,
            "BD": self.tile,
            # 16 elements a thread, of which the backward kernel keeps half a dozen tiles.
            "num_warps": max(4, self.tile // 512),
        }


def _launch_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, norm_first: bool, groups: int, eps: float
) -> Tensor:
    call = _Call(x, gate, weight, groups)
    y = x.new_empty(x.shape)
    with on_device_of(x):
        _forward_kernel[grid(call.blocks, groups)](
            call.x, call.gate, call.weight, y, **call.common(silu, norm_first, eps)
        )
    return y


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    silu: bool,
    norm_first: bool,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, gate, weight, groups)
    dx, _, dgate = _gradient_shapes(dy, x, weight, gate, silu, norm_first, groups, eps)
    programs = min(call.blocks, PROGRAMS)
    partial = x.new_empty((programs, call.width) if weight is not None else (0,), dtype=accumulate_dtype(x.dtype))
    with on_device_of(x):
        _backward_kernel[grid(programs, groups)](
            dy.contiguous(), call.x, call.gate, call.weight, dx, dgate, partial,
            blocks=call.blocks, **call.common(silu, norm_first, eps),
        )  # fmt: skip
    return dx, partial if weight is None else partial.sum(0).to(weight.dtype), dgate


@custom_op("omnimix::norm_triton")
def _forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, norm_first: bool, groups: int, eps: float
) -> Tensor:
    return _launch_forward(x, weight, gate, silu, norm_first, groups, eps)


@_forward.register_fake
@launches(_launch_forward)
def _(x, weight, gate, silu, norm_first, groups, eps):
    return x.new_empty(x.shape)


@custom_op("omnimix::norm_triton_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    silu: bool,
    norm_first: bool,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(dy, x, weight, gate, silu, norm_first, groups, eps)


def _gradient_shapes(dy, x, weight, gate, silu, norm_first, groups, eps):
    dweight = x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight, x.new_empty(0) if gate is None else gate.new_empty(gate.shape)


_backward.register_fake(launches(_launch_backward)(_gradient_shapes))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.norm_first, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    x, weight, gate = ctx.saved_tensors
    dx, dweight, dgate = torch.ops.omnimix.norm_triton_backward(
        dy.contiguous(), x, weight, gate, ctx.silu, ctx.norm_first, ctx.groups, ctx.eps
    )
    return dx, None if weight is None else dweight, None if gate is None else dgate, None, None, None, None


_forward.register_gradients(_differentiate, _save)


def norm_triton(
    *,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
    norm_before_gate: bool,
    groups: int,
    eps: float,
) -> Tensor:
    """See `omnimix.kernels.norm`."""
    silu = gate_activation == "silu"
    return torch.ops.omnimix.norm_triton(x, weight, gate, silu, norm_before_gate, groups, eps)
