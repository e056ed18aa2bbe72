"""Triton kernels of `linear_recurrence`: a program runs a scan tile by tile through one sequence's time.

`_forward_kernel` reads x and a and writes h: 3 element sizes a number, 2 operations (8 for complex numbers), so it is
bound by memory: at most 2 / (3 · 4) operations a byte in float32. `_backward_kernel` reads dh, a (at the next step) and
h (at the step before) and writes dx and da: 5 element sizes a number and 4 operations. Programs: sequences times blocks
of channels; time is sequential, so few sequences of few channels leave a large GPU idle.

Complex numbers are pairs of neighbouring real ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import grid, interpreting, on_device_of, tuned, unit_stride
from ..common.triton_scan import multiply, scan
from .ops import gradient_shapes, register, shapes

# Steps in a tile, as a power of 2.
LOG_STEPS = 5
TILES = [{"BD": 32, "num_warps": 4}, {"BD": 64, "num_warps": 4}]


@triton.jit
def _load(x, at, inside, default, COMPLEX: tl.constexpr, ACC: tl.constexpr):
    """Real and imaginary parts; where outside, `default` and zero."""
    if COMPLEX:
        real = tl.load(x + 2 * at, mask=inside, other=default).to(ACC)
        return real, tl.load(x + 2 * at + 1, mask=inside, other=0.0).to(ACC)
    else:
        real = tl.load(x + at, mask=inside, other=default).to(ACC)
        return real, real


@triton.jit
def _store(x, at, inside, real, imaginary, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(x + 2 * at, real.to(x.dtype.element_ty), mask=inside)
        tl.store(x + 2 * at + 1, imaginary.to(x.dtype.element_ty), mask=inside)
    else:
        tl.store(x + at, real.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _sequence(bounds, length):
    """The program's sequence, its batch row, its first step, and its length."""
    sequence = tl.program_id(0).to(tl.int64)
    if bounds is not None:
        start = tl.load(bounds + sequence).to(tl.int64)
        return sequence, sequence * 0, start, tl.load(bounds + sequence + 1).to(tl.int64) - start
    else:
        return sequence, sequence, sequence * 0, sequence * 0 + length


@triton.jit
def _last(x, row, ROWS: tl.constexpr):
    return tl.sum(tl.where(row == ROWS - 1, x, 0.0), 0)


@tuned(TILES, key=["D"])
@triton.jit
def _forward_kernel(
    x, a, state, h, final, bounds, x_batch, x_step, a_batch, a_step, length, D,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr, STEPWISE: tl.constexpr, LOG: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    sequence, batch, start, steps = _sequence(bounds, length)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    valid = column < D
    row = tl.arange(0, 1 << LOG)[:, None] + tl.zeros([1 << LOG, BD], dtype=tl.int32)
    real = tl.zeros([BD], dtype=ACC)
    imaginary = tl.zeros([BD], dtype=ACC)
    if state is not None:
        real, imaginary = _load(state, sequence * D + column, valid, 0.0, COMPLEX, ACC)
    for i in range(0, steps, 1 << LOG):
        p = i + row
        if REVERSE:
            t = start + steps - 1 - p
        else:
            t = start + p
        inside = (p < steps) & valid[None, :]
        # After the end nothing is added and nothing forgotten, so that the last row is the state.
        ur, ui = _load(x, batch * x_batch + t * x_step + column[None, :], inside, 0.0, COMPLEX, ACC)
        ar, ai = _load(a, batch * a_batch + t * a_step + column[None, :], inside, 1.0, COMPLEX, ACC)
        ar, ai, hr, hi = scan(ar, ai, ur, ui, row, LOG, False, COMPLEX, STEPWISE)
        kept, kept_i = multiply(ar, ai, real[None, :], imaginary[None, :], COMPLEX)
        hr += kept
        if COMPLEX:
            hi += kept_i
        _store(h, (batch * length + t) * D + column[None, :], inside, hr, hi, COMPLEX)
        real = _last(hr, row, 1 << LOG)
        if COMPLEX:
            imaginary = _last(hi, row, 1 << LOG)
    _store(final, sequence * D + column, valid, real, imaginary, COMPLEX)


@tuned([{"BD": 32, "num_warps": 4}, {"BD": 64, "num_warps": 8}], key=["D"])
@triton.jit
def _backward_kernel(
    dh, dfinal, h, a, state, dx, da, dstate, bounds, a_batch, a_step, length, D,
    CONSTANT: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr, STEPWISE: tl.constexpr,
    LOG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sequence, batch, start, steps = _sequence(bounds, length)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    valid = column < D
    row = tl.arange(0, 1 << LOG)[:, None] + tl.zeros([1 << LOG, BD], dtype=tl.int32)
    real, imaginary = _load(dfinal, sequence * D + column, valid, 0.0, COMPLEX, ACC)
    total = tl.zeros([BD], dtype=ACC)
    total_i = tl.zeros([BD], dtype=ACC)
    if REVERSE:
        first = start + steps - 1
        forward = -1
    else:
        first = start
        forward = 1
    for i in range(0, steps, 1 << LOG):
        # The place of a step in the order of the recurrence, from its end.
        p = steps - 1 - i - row
        t = first + forward * p
        inside = (p >= 0) & valid[None, :]
        behind = inside & (p + 1 < steps)
        at = (batch * length + t) * D + column[None, :]
        ur, ui = _load(dh, at, inside, 0.0, COMPLEX, ACC)
        ar, ai = _load(a, batch * a_batch + (t + forward) * a_step + column[None, :], behind, 1.0, COMPLEX, ACC)
        ar, ai, gr, gi = scan(ar, -ai, ur, ui, row, LOG, False, COMPLEX, STEPWISE)
        kept, kept_i = multiply(ar, ai, real[None, :], imaginary[None, :], COMPLEX)
        gr += kept
        if COMPLEX:
            gi += kept_i
        _store(dx, at, inside, gr, gi, COMPLEX)
        br, bi = _load(h, at - forward * D, inside & (p > 0), 0.0, COMPLEX, ACC)
        if state is not None:
            outer, outer_i = _load(state, sequence * D + column[None, :], inside & (p == 0), 0.0, COMPLEX, ACC)
            br += outer
            if COMPLEX:
                bi += outer_i
        through, through_i = multiply(br, -bi, gr, gi, COMPLEX)
        if CONSTANT:
            total += tl.sum(tl.where(inside, through, 0.0), 0)
            if COMPLEX:
                total_i += tl.sum(tl.where(inside, through_i, 0.0), 0)
        else:
            _store(da, at, inside, through, through_i, COMPLEX)
        real = _last(gr, row, 1 << LOG)
        if COMPLEX:
            imaginary = _last(gi, row, 1 << LOG)
    if CONSTANT:
        _store(da, sequence * D + column, valid, total, total_i, COMPLEX)
    if dstate is not None:
        # An empty sequence has no first step, and passes the gradient on as it is.
        ar, ai = _load(a, batch * a_batch + first * a_step + column, valid & (steps > 0), 1.0, COMPLEX, ACC)
        real, imaginary = multiply(ar, -ai, real, imaginary, COMPLEX)
        _store(dstate, sequence * D + column, valid, real, imaginary, COMPLEX)


def _reals(x: Tensor | None) -> Tensor | None:
    """Complex numbers as pairs in a last dimension of 2."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def _options(x: Tensor, reverse: bool) -> dict[str, object]:
    double = x.dtype in (torch.float64, torch.complex128)
    return {
        "length": x.shape[1], "D": x.shape[2], "REVERSE": reverse, "COMPLEX": x.is_complex(),
        "ACC": tl.float64 if double else tl.float32, "STEPWISE": interpreting(), "LOG": LOG_STEPS,
    }  # fmt: skip


def _factors(a: Tensor, x: Tensor) -> tuple[Tensor, int, int]:
    """The factors, and their strides over batch and time in numbers."""
    a = unit_stride(a.expand(x.shape))
    return a, a.stride(0), a.stride(1)


def _launch_forward(x, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor]:
    h, final = shapes(x, a, initial_state, cu_seqlens, reverse)
    x = unit_stride(x)
    a, a_batch, a_step = _factors(a, x)
    state = None if initial_state is None else initial_state.contiguous()
    with on_device_of(x):
        _forward_kernel[lambda o: grid(final.shape[0], triton.cdiv(x.shape[2], o["BD"]))](
            _reals(x), _reals(a), _reals(state), _reals(h), _reals(final), cu_seqlens,
            x_batch=x.stride(0), x_step=x.stride(1), a_batch=a_batch, a_step=a_step, **_options(x, reverse),
        )  # fmt: skip
    return h, final


def _launch_backward(dh, dfinal, h, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, dstate = gradient_shapes(dh, dfinal, h, a, initial_state, cu_seqlens, reverse)
    constant = a.dim() == 1
    # A constant factor's gradient is a sum over time: one share a sequence.
    shares = dfinal.new_empty(dfinal.shape) if constant else da
    factors, a_batch, a_step = _factors(a, h)
    state = None if initial_state is None else initial_state.contiguous()
    with on_device_of(h):
        _backward_kernel[lambda o: grid(dfinal.shape[0], triton.cdiv(h.shape[2], o["BD"]))](
            _reals(dh.contiguous()), _reals(dfinal.contiguous()), _reals(h.contiguous()), _reals(factors),
            _reals(state), _reals(dx), _reals(shares), None if state is None else _reals(dstate), cu_seqlens,
            a_batch=a_batch, a_step=a_step, CONSTANT=constant, **_options(h, reverse),
        )  # fmt: skip
    return dx, shares.sum(0).to(a.dtype) if constant else da, dstate


linear_recurrence_triton = register("triton", _launch_forward, _launch_backward)
