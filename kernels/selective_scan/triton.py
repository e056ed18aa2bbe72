"""Triton kernels of `selective_scan`: a program runs a scan over tiles (step, channel, n) through one sequence's time.

Per step, channel and state the forward kernel takes one power and about 6 operations, on values that it makes itself:
it reads x, Δ and z (d numbers a step each), B and C (n numbers a step for every block of channels, mostly from the
cache) and writes y: 4 d + 2 n numbers a step, and n d / CHUNK float32 numbers for the states at the tiles' starts, from
which the backward kernel begins. Intensity: 7 n d / (2 · 4 d + 4 d n / CHUNK) operations a byte in bfloat16, 9 for
n = 16.

The backward kernel recomputes a tile's states and runs a scan the other way: 3 powers and about 25 operations per step,
channel and state. It reads x, Δ, z, dy, B, C and the saved states and writes dx, dΔ, dz, and for dB and dC one share of
n float32 numbers a step for each block of channels, 2 n d / BD numbers a step, which are summed afterwards: so that
results repeat, nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import accumulate_dtype, grid, interpreting, on_device_of, tuned, unit_stride
from ..common.triton_scan import scan
from . import MOST_STATES
from .ops import Gradients, Outputs, by_name, gradient_shapes, register, shapes

# Steps in a tile, as a power of 2, and between saved states.
LOG_STEPS = 4
CHUNK = 1 << LOG_STEPS
# Channels times states of a tile; a channel's states are not divided. Sums over more states take more registers.
TILE, NARROW_TILE = 256, MOST_STATES
WARPS = [{"num_warps": 4}, {"num_warps": 8}]


@triton.jit
def _sequence(bounds, length, CHUNK: tl.constexpr):
    """The program's sequence, its batch row, first step, end, and its first tile's number."""
    sequence = tl.program_id(0).to(tl.int64)
    if bounds is not None:
        start = tl.load(bounds + sequence).to(tl.int64)
        return sequence, sequence * 0, start, tl.load(bounds + sequence + 1).to(tl.int64), start // CHUNK + sequence
    else:
        return sequence, sequence, sequence * 0, sequence * 0 + length, sequence * ((length + CHUNK - 1) // CHUNK)


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + u) with u = exp(-|x|); the quotient undoes the rounding of 1 + u."""
    u = tl.exp(-tl.abs(x))
    w = 1 + u
    log = tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(x > 0, x, 0.0) + log


@triton.jit
def _sigmoid(x):
    u = tl.exp(-tl.abs(x))
    return tl.where(x < 0, u, 1.0) / (1 + u)


@triton.jit
def _raw(delta, bias, row, t, inside, channel, step, ACC: tl.constexpr):
    """Δ before the softplus, at steps t (BT,) of a batch row that starts at `row`."""
    raw = tl.load(delta + row + t[:, None] * step + channel[None, :], mask=inside, other=0.0).to(ACC)
    if bias is not None:
        raw += tl.load(bias + channel)[None, :].to(ACC)
    return raw


@triton.jit
def _step(delta, bias, row, t, inside, channel, step, SOFTPLUS: tl.constexpr, ACC: tl.constexpr):
    """Δ; zero outside, where nothing is then added and nothing forgotten."""
    raw = _raw(delta, bias, row, t, inside, channel, step, ACC)
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(inside, raw, 0.0)


@triton.jit
def _rows(x, row, t, inside, column, step, ACC: tl.constexpr):
    """A tile (step, column) of a sequence; zeros outside."""
    return tl.load(x + row + t[:, None] * step + column[None, :], mask=inside, other=0.0).to(ACC)


@tuned(WARPS, key=["D", "BN"])
@triton.jit
def _forward_kernel(
    x, delta, A, B, C, skip, z, bias, state, y, final, borders, bounds,
    x_batch, x_step, delta_batch, delta_step, B_batch, B_step, B_group, C_batch, C_step, C_group, z_batch, z_step,
    length, D, N, WIDTH, BLOCKS,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr, STEPWISE: tl.constexpr, LOG: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = 1 << LOG
    sequence, batch, start, end, tile = _sequence(bounds, length, BT)
    block = tl.program_id(1).to(tl.int64)
    group = block // BLOCKS
    within = (block % BLOCKS) * BD + tl.arange(0, BD)
    valid = within < WIDTH
    # Channels outside read the group's first one and write nothing.
    channel = group * WIDTH + tl.where(valid, within, 0)
    k = tl.arange(0, BN)
    kept = valid[:, None] & (k < N)[None, :]
    decay = tl.load(A + channel[:, None] * N + k[None, :], mask=kept, other=0.0).to(ACC)
    at_state = (sequence * D + channel[:, None]) * N + k[None, :]
    h = tl.zeros([BD, BN], dtype=ACC)
    if state is not None:
        h += tl.load(state + at_state, mask=kept, other=0.0).to(ACC)
    row = tl.arange(0, BT)[:, None, None] + tl.zeros([BT, BD, BN], dtype=tl.int32)
    for first in range(start, end, BT):
        t = first + tl.arange(0, BT)
        inside = (t < end)[:, None] & valid[None, :]
        states = (t < end)[:, None] & (k < N)[None, :]
        tl.store(borders + (tile * N + k[None, :]) * D + channel[:, None], h, mask=kept)
        tile += 1
        now = _step(delta, bias, batch * delta_batch, t, inside, channel, delta_step, SOFTPLUS, ACC)
        own = _rows(x, batch * x_batch, t, inside, channel, x_step, ACC)
        into = _rows(B, batch * B_batch + group * B_group, t, states, k, B_step, ACC)
        a = tl.exp(now[:, :, None] * decay[None, :, :])
        u = (now * own)[:, :, None] * into[:, None, :]
        a, _, u, _ = scan(a, a, u, u, row, LOG, False, False, STEPWISE)
        u += a * h[None, :, :]
        h = tl.sum(tl.where(row == BT - 1, u, 0.0), 0)
        out = _rows(C, batch * C_batch + group * C_group, t, states, k, C_step, ACC)
        value = tl.sum(u * out[:, None, :], 2)
        if skip is not None:
            value += own * tl.load(skip + channel)[None, :].to(ACC)
        if z is not None:
            gate = _rows(z, batch * z_batch, t, inside, channel, z_step, ACC)
            value *= gate * _sigmoid(gate)
        at = (batch * length + t[:, None]) * D + channel[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(final + at_state, h, mask=kept)


@tuned([{"num_warps": 8}], key=["D", "BN"])
@triton.jit
def _backward_kernel(
    dy, dfinal, borders, x, delta, A, B, C, skip, z, bias, bounds, dx, ddelta, dA, dB, dC, dskip, dz, dbias, dstate,
    x_batch, x_step, delta_batch, delta_step, B_batch, B_step, B_group, C_batch, C_step, C_group, z_batch, z_step,
    rows, length, D, N, WIDTH, BLOCKS, GROUPS,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr, STEPWISE: tl.constexpr, LOG: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = 1 << LOG
    sequence, batch, start, end, tile = _sequence(bounds, length, BT)
    block = tl.program_id(1).to(tl.int64)
    group = block // BLOCKS
    within = (block % BLOCKS) * BD + tl.arange(0, BD)
    valid = within < WIDTH
    channel = group * WIDTH + tl.where(valid, within, 0)
    k = tl.arange(0, BN)
    kept = valid[:, None] & (k < N)[None, :]
    decay = tl.load(A + channel[:, None] * N + k[None, :], mask=kept, other=0.0).to(ACC)
    at_state = (sequence * D + channel[:, None]) * N + k[None, :]
    # The gradient of the state after the tile, without what its own outputs add.
    carry = tl.load(dfinal + at_state, mask=kept, other=0.0).to(ACC)
    sum_A = tl.zeros([BD, BN], dtype=ACC)
    sum_skip = tl.zeros([BD], dtype=ACC)
    sum_bias = tl.zeros([BD], dtype=ACC)
    row = tl.arange(0, BT)[:, None, None] + tl.zeros([BT, BD, BN], dtype=tl.int32)
    tiles = (end - start + BT - 1) // BT
    for i in range(0, tiles):
        number = tiles - 1 - i
        t = start + number * BT + tl.arange(0, BT)
        inside = (t < end)[:, None] & valid[None, :]
        states = (t < end)[:, None] & (k < N)[None, :]
        at = (batch * length + t[:, None]) * D + channel[None, :]
        row_B = batch * B_batch + group * B_group
        into = _rows(B, row_B, t, states, k, B_step, ACC)
        out = _rows(C, batch * C_batch + group * C_group, t, states, k, C_step, ACC)
        own = _rows(x, batch * x_batch, t, inside, channel, x_step, ACC)
        now = _step(delta, bias, batch * delta_batch, t, inside, channel, delta_step, SOFTPLUS, ACC)
        # The states before each step: a scan of the step before, on top of the tile's first state.
        past = inside & (t > start + number * BT)[:, None]
        before = _step(delta, bias, batch * delta_batch, t - 1, past, channel, delta_step, SOFTPLUS, ACC)
        u = before * _rows(x, batch * x_batch, t - 1, past, channel, x_step, ACC)
        earlier = states & (t > start + number * BT)[:, None]
        u = u[:, :, None] * _rows(B, row_B, t - 1, earlier, k, B_step, ACC)[:, None, :]
        a = tl.exp(before[:, :, None] * decay[None, :, :])
        a, _, h, _ = scan(a, a, u, u, row, LOG, False, False, STEPWISE)
        border = tl.load(borders + ((tile + number) * N + k[None, :]) * D + channel[:, None], mask=kept, other=0.0)
        h += a * border[None, :, :]
        # What the gate multiplies, and its gradient.
        a = tl.exp(now[:, :, None] * decay[None, :, :])
        after = a * h + (now * own)[:, :, None] * into[:, None, :]
        grow = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
        if z is not None:
            value = tl.sum(after * out[:, None, :], 2)
            if skip is not None:
                value += own * tl.load(skip + channel)[None, :].to(ACC)
            gate = _rows(z, batch * z_batch, t, inside, channel, z_step, ACC)
            s = _sigmoid(gate)
            tl.store(dz + at, (grow * value * s * (1 + gate * (1 - s))).to(dz.dtype.element_ty), mask=inside)
            grow *= gate * s
        # One share of dB and dC for each block of channels: [block, batch, step, group, n].
        share = ((block % BLOCKS) * rows + batch * length + t[:, None]) * GROUPS * N + group * N + k[None, :]
        tl.store(dC + share, tl.sum(after * grow[:, :, None], 1), mask=states)
        # The gradients of the states after each step: a scan back through the decays of the later steps.
        behind = inside & (t + 1 < end)[:, None]
        next_step = _step(delta, bias, batch * delta_batch, t + 1, behind, channel, delta_step, SOFTPLUS, ACC)
        factor = tl.exp(next_step[:, :, None] * decay[None, :, :])
        u = grow[:, :, None] * out[:, None, :]
        factor, _, g, _ = scan(factor, factor, u, u, row, LOG, True, False, STEPWISE)
        g += factor * carry[None, :, :]
        carry = tl.sum(tl.where(row == 0, g, 0.0), 0)
        tl.store(dB + share, tl.sum(g * (now * own)[:, :, None], 1), mask=states)
        through = g * a * h
        sum_A += tl.sum(through * now[:, :, None], 0)
        du = tl.sum(g * into[:, None, :], 2)
        dnow = tl.sum(through * decay[None, :, :], 2) + du * own
        down = du * now
        if skip is not None:
            down += grow * tl.load(skip + channel)[None, :].to(ACC)
            sum_skip += tl.sum(grow * own, 0)
        if SOFTPLUS:
            dnow *= _sigmoid(_raw(delta, bias, batch * delta_batch, t, inside, channel, delta_step, ACC))
        dnow = tl.where(inside, dnow, 0.0)
        sum_bias += tl.sum(dnow, 0)
        tl.store(dx + at, down.to(dx.dtype.element_ty), mask=inside)
        tl.store(ddelta + at, dnow.to(ddelta.dtype.element_ty), mask=inside)
    # Through the first step's decay, which no step before it has taken; an empty sequence has none.
    first = start + tl.zeros([1], dtype=tl.int64)
    some = valid[None, :] & (start < end)
    now = _step(delta, bias, batch * delta_batch, first, some, channel, delta_step, SOFTPLUS, ACC)
    carry *= tl.exp(tl.sum(now, 0)[:, None] * decay)
    tl.store(dstate + at_state, carry, mask=kept)
    tl.store(dA + at_state, sum_A, mask=kept)
    tl.store(dskip + sequence * D + channel, sum_skip, mask=valid)
    tl.store(dbias + sequence * D + channel, sum_bias, mask=valid)


class _Call:
    """How one call is cut into programs, and what its launches share."""

    def __init__(self, x, delta, A, B, C, z, cu_seqlens, softplus):
        d, n = A.shape
        self.groups = B.shape[2]
        self.width, self.states = d // self.groups, triton.next_power_of_2(n)
        room = TILE if self.states <= 16 else NARROW_TILE
        self.channels = min(triton.next_power_of_2(self.width), room // self.states, 16)
        self.blocks = triton.cdiv(self.width, self.channels)
        self.sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.dtype = accumulate_dtype(x.dtype)
        # Strides are given as those of tensors whose neighbours in the last dimension are neighbours in memory.
        self.x, self.delta, self.B, self.C = (unit_stride(s) for s in (x, delta, B, C))
        self.z = None if z is None else unit_stride(z)
        strides = {}
        for name, tensor in (("x", self.x), ("delta", self.delta), ("B", self.B), ("C", self.C), ("z", self.z)):
            strides[f"{name}_batch"], strides[f"{name}_step"] = tensor.stride()[:2] if tensor is not None else (0, 0)
        strides |= {"B_group": self.B.stride(2), "C_group": self.C.stride(2)}
        self.common = strides | {
            "bounds": cu_seqlens, "length": x.shape[1], "D": d, "N": n, "WIDTH": self.width, "BLOCKS": self.blocks,
            "SOFTPLUS": softplus, "STEPWISE": interpreting(), "LOG": LOG_STEPS, "BD": self.channels,
            "BN": self.states, "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }  # fmt: skip

    def grid(self) -> tuple[int, ...]:
        return grid(self.sequences, self.groups * self.blocks)


def _launch_forward(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus) -> Outputs:
    y, final, borders = shapes(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus, CHUNK)
    call = _Call(x, delta, A, B, C, z, cu_seqlens, softplus)
    A, D, bias, initial_state = (None if p is None else p.contiguous() for p in (A, D, bias, initial_state))
    with on_device_of(x):
        _forward_kernel[call.grid()](
            call.x, call.delta, A, call.B, call.C, D, call.z, bias, initial_state, y, final, borders, **call.common
        )
    return y, final, borders


def _launch_backward(
    dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus
) -> Gradients:
    arguments = (x, delta, A, B, C, D, z, bias, initial_state)
    empty = gradient_shapes(dy, dfinal, borders, *arguments)
    call = _Call(x, delta, A, B, C, z, cu_seqlens, softplus)

    def wide(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=call.dtype)

    dx, ddelta, dz, d = empty[0], empty[1], empty[6], x.shape[2]
    # One share a sequence, or a block of channels.
    dA, dD, dbias, dstate = (
        wide(call.sequences, *A.shape),
        wide(call.sequences, d),
        wide(call.sequences, d),
        wide(*dfinal.shape),
    )
    dB, dC = wide(call.blocks, *B.shape), wide(call.blocks, *B.shape)
    A, D, bias = (None if p is None else p.contiguous() for p in (A, D, bias))
    with on_device_of(x):
        _backward_kernel[call.grid()](
            dy.contiguous(), dfinal.contiguous(), borders, call.x, call.delta, A, call.B, call.C, D, call.z, bias,
            dx=dx, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dskip=dD, dz=dz, dbias=dbias, dstate=dstate,
            rows=x.shape[0] * x.shape[1], GROUPS=call.groups, **call.common,
        )  # fmt: skip
    found = (dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dstate)
    return tuple(e if a is None else f.to(a.dtype) for f, a, e in zip(found, arguments, empty, strict=True))


selective_scan_triton = by_name(register("triton", CHUNK, _launch_forward, _launch_backward))
