"""Triton kernels of `short_conv`: a program computes a tile of steps and channels from shifted loads.

Backward, `_taps_kernel` finds the gradient of what the activation sees and each tile's sums for weight and bias (one
row of partial sums a tile, so that nothing is added atomically); `_inputs_kernel` runs the filters over it backwards in
time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import accumulate_dtype, chunk_table, grid, launches, on_device_of, tuned, unit_stride
from ..custom import custom_op

# Steps in a tile.
STEPS = 64
TILES = [{"BD": 64, "num_warps": 8}, {"BD": 128, "num_warps": 8}]


@triton.jit
def _tile(table, bounds, length, chunks, BT: tl.constexpr):
    """Sequence (or batch row), its batch row, the tile's steps, and the sequence's first step and end."""
    row = tl.program_id(0).to(tl.int64)
    if table is not None:
        sequence = tl.load(table + 2 * row).to(tl.int64)
        chunk = tl.load(table + 2 * row + 1).to(tl.int64)
        start = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        batch = sequence * 0
    else:
        sequence = row // chunks
        chunk = row % chunks
        start = sequence * 0
        end = start + length
        batch = sequence
    return sequence, batch, start + chunk * BT, start, end


@triton.jit
def _input(x, state, t, start, end, column, stride, D, W: tl.constexpr, ACC: tl.constexpr):
    """Inputs at steps t, which reach back into the state (of this sequence, [D, W - 1]); zero where there are none."""
    value = tl.load(
        x + t[:, None] * stride + column[None, :],
        mask=((t >= start) & (t < end))[:, None] & (column < D)[None, :],
        other=0.0,
    ).to(ACC)
    if state is not None:
        # Rows after the last tile have no sequence, and no state either.
        slot = t - start + W - 1
        value += tl.load(
            state + column[None, :] * (W - 1) + slot[:, None],
            mask=((slot >= 0) & (t < start) & (start < end))[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(ACC)
    return value


@triton.jit
def _convolve(x, weight, bias, state, t, start, end, column, stride, D, W: tl.constexpr, ACC: tl.constexpr):
    z = tl.zeros([t.shape[0], column.shape[0]], dtype=ACC)
    if bias is not None:
        z += tl.load(bias + column, mask=column < D, other=0.0).to(ACC)[None, :]
    for j in tl.static_range(W):
        tap = tl.load(weight + column * W + (W - 1 - j), mask=column < D, other=0.0).to(ACC)[None, :]
        z += tap * _input(x, state, t - j, start, end, column, stride, D, W, ACC)
    return z


@tuned(TILES, key=["D", "W"])
@triton.jit
def _forward_kernel(
    x, weight, bias, state, y, final, table, bounds, batch_stride, stride, length, chunks, D,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sequence, batch, first, start, end = _tile(table, bounds, length, chunks, BT)
    t = first + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    x += batch * batch_stride
    if state is not None:
        state += sequence * D * (W - 1)
    z = _convolve(x, weight, bias, state, t, start, end, column, stride, D, W, ACC)
    if SILU:
        z /= 1 + tl.exp(-z)
    at = (batch * length + t[:, None]) * D + column[None, :]
    tl.store(y + at, z.to(y.dtype.element_ty), mask=(t < end)[:, None] & (column < D)[None, :])
    if W > 1:
        if (first < end) & (first + BT >= end):
            for slot in tl.static_range(W - 1):
                step = end - (W - 1) + slot + tl.arange(0, 1)
                value = tl.sum(_input(x, state, step, start, end, column, stride, D, W, ACC), 0)
                into = final + (sequence * D + column) * (W - 1) + slot
                tl.store(into, value.to(final.dtype.element_ty), mask=column < D)


@tuned(TILES, key=["D", "W"])
@triton.jit
def _taps_kernel(
    dy, x, weight, bias, state, dz, partial, table, bounds, batch_stride, stride, length, chunks, D,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sequence, batch, first, start, end = _tile(table, bounds, length, chunks, BT)
    t = first + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    x += batch * batch_stride
    if state is not None:
        state += sequence * D * (W - 1)
    at = (batch * length + t[:, None]) * D + column[None, :]
    inside = (t < end)[:, None] & (column < D)[None, :]
    g = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
    if SILU:
        z = _convolve(x, weight, bias, state, t, start, end, column, stride, D, W, ACC)
        s = 1 / (1 + tl.exp(-z))
        g *= s * (1 + z * (1 - s))
        tl.store(dz + at, g, mask=inside)
    # Partial sums [tiles, W + 1, D]: the filters' gradient by lag, then the bias's.
    into = partial + tl.program_id(0).to(tl.int64) * (W + 1) * D + column
    for j in tl.static_range(W):
        lagged = _input(x, state, t - j, start, end, column, stride, D, W, ACC)
        tl.store(into + (W - 1 - j) * D, tl.sum(g * lagged, 0), mask=column < D)
    tl.store(into + W * D, tl.sum(g, 0), mask=column < D)


@triton.jit
def _reached(dz, dfinal, weight, t, start, end, column, D, W: tl.constexpr, ACC: tl.constexpr):
    """Gradients of the inputs at steps t, which may lie before the start: then they are the state's."""
    g = tl.zeros([t.shape[0], column.shape[0]], dtype=ACC)
    for j in tl.static_range(W):
        tap = tl.load(weight + column * W + (W - 1 - j), mask=column < D, other=0.0).to(ACC)[None, :]
        inside = ((t + j >= start) & (t + j < end))[:, None] & (column < D)[None, :]
        g += tap * tl.load(dz + (t + j)[:, None] * D + column[None, :], mask=inside, other=0.0).to(ACC)
    if W > 1:
        slot = t - (end - (W - 1))
        kept = ((slot >= 0) & (t < end))[:, None] & (column < D)[None, :]
        g += tl.load(dfinal + column[None, :] * (W - 1) + slot[:, None], mask=kept, other=0.0).to(ACC)
    return g


@tuned(TILES, key=["D", "W"])
@triton.jit
def _inputs_kernel(
    dz, dfinal, weight, dx, dstate, table, bounds, length, chunks, D,
    W: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sequence, batch, first, start, end = _tile(table, bounds, length, chunks, BT)
    t = first + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    dz += batch * length * D
    dfinal += sequence * D * (W - 1)
    g = _reached(dz, dfinal, weight, t, start, end, column, D, W, ACC)
    at = (batch * length + t[:, None]) * D + column[None, :]
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask=(t < end)[:, None] & (column < D)[None, :])
    if dstate is not None:
        if (first == start) & (first < end):
            for slot in tl.static_range(W - 1):
                step = start - (W - 1) + slot + tl.arange(0, 1)
                value = tl.sum(_reached(dz, dfinal, weight, step, start, end, column, D, W, ACC), 0)
                into = dstate + (sequence * D + column) * (W - 1) + slot
                tl.store(into, value.to(dstate.dtype.element_ty), mask=column < D)


class _Call:
    """How one call is cut into tiles, and what its launches share."""

    def __init__(self, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = x.shape
        self.width = weight.shape[1]
        self.chunks = triton.cdiv(self.length, STEPS)
        self.sequences, self.rows = self.batch, self.batch * self.chunks
        self.table = self.bounds = None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.table, _ = chunk_table(cu_seqlens, STEPS, self.length)
            self.rows = self.table.shape[0]
            # The table's last rows name a sequence after the last one, which ends where it starts.
            self.bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
        self.dtype = accumulate_dtype(x.dtype)

    def grid(self, options: dict[str, int]) -> tuple[int, ...]:
        return grid(self.rows, triton.cdiv(self.channels, options["BD"]))

    def common(self) -> dict[str, object]:
        return {
            "table": self.table, "bounds": self.bounds, "length": self.length, "chunks": self.chunks,
            "D": self.channels, "W": self.width, "BT": STEPS,
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }  # fmt: skip


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    call, x = _Call(x, weight, cu_seqlens), unit_stride(x)
    y, final = _shapes(x, weight, bias, initial_state, cu_seqlens, silu)
    if cu_seqlens is not None:
        # An empty sequence has no tile that writes its state.
        final.zero_() if initial_state is None else final.copy_(initial_state)
    with on_device_of(x):
        _forward_kernel[call.grid](
            x, weight.contiguous(), bias, initial_state, y, final, batch_stride=x.stride(0), stride=x.stride(1),
            SILU=silu, **call.common(),
        )  # fmt: skip
    return y, final


def _launch_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call, x, dy = _Call(x, weight, cu_seqlens), unit_stride(x), dy.contiguous()
    dx, dweight, dbias, dstate = _gradient_shapes(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)
    if cu_seqlens is not None and initial_state is not None:
        dstate.copy_(dfinal)
    taps = weight.contiguous()
    dz = dy.new_empty(dy.shape, dtype=call.dtype) if silu else dy
    partial = x.new_empty(call.rows, call.width + 1, call.channels, dtype=call.dtype)
    with on_device_of(x):
        _taps_kernel[call.grid](
            dy, x, taps, bias, initial_state, dz, partial, batch_stride=x.stride(0), stride=x.stride(1),
            SILU=silu, **call.common(),
        )  # fmt: skip
        _inputs_kernel[call.grid](
            dz, dfinal.contiguous(), taps, dx, None if initial_state is None else dstate, **call.common()
        )
    sums = partial.sum(0)
    dweight = sums[:-1].t().to(weight.dtype).contiguous()
    return dx, dweight, dbias if bias is None else sums[-1].to(bias.dtype, copy=True), dstate


@custom_op("omnimix::short_conv_triton")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, weight, bias, initial_state, cu_seqlens, silu)


def _shapes(x, weight, bias, initial_state, cu_seqlens, silu):
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n, x.shape[2], weight.shape[1] - 1)


_forward.register_fake(launches(_launch_forward)(_shapes))


@custom_op("omnimix::short_conv_triton_backward")
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)


def _gradient_shapes(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu):
    def like(argument):
        return x.new_empty(0) if argument is None else argument.new_empty(argument.shape)

    return x.new_empty(x.shape), weight.new_empty(weight.shape), like(bias), like(initial_state)


_backward.register_fake(launches(_launch_backward)(_gradient_shapes))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy, dfinal):
    _, _, bias, initial_state, _ = ctx.saved_tensors
    dx, dweight, dbias, dstate = torch.ops.omnimix.short_conv_triton_backward(
        dy.contiguous(), dfinal.contiguous(), *ctx.saved_tensors, ctx.silu
    )
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dstate, None, None


_forward.register_gradients(_differentiate, _save)


def short_conv_triton(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.short_conv`."""
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.omnimix.short_conv_triton(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
