"""Triton kernels of `gated_linear`, chunk by chunk, forward and backward.

A sequence is cut into chunks of C steps. `_state_kernel` walks over the chunks and keeps the state at the border of
each; everything else is parallel over chunks: `_score_kernel` computes the C x C weights of the values within a chunk,
`_output_kernel` adds to their product what the state contributes (GLA, arXiv 2312.06635, sections 4.1 and 4.2).
Backward, the same three kernels serve: the state's gradient walks the other way with (q, do) in place of (k, v), the
scores' gradient is a score of (do, v), and dv is an output of (k, do); `_gradient_kernel` computes the rest.

Exponents are sums of log decays over a range of steps, always added up from the range itself: no exponent is positive
and none is the difference of two large sums. `prefix` is the sum from the start of a chunk (or block) to the step that
reads the state, `suffix` the sum from behind a step to the end. With a bonus the state is read before the step's own
decay, so the prefix leaves that out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tools import (
    accumulate_dtype,
    chunk_table,
    dot_mode,
    grid,
    interpreting,
    launches,
    on_device_of,
    tile,
    tuned,
    unit_stride,
)
from ..triton_tools import dot

NONE, SCALAR, CHANNEL = (tl.constexpr(i) for i in range(3))
BLOCK = tl.constexpr(16)


@triton.jit
def _chunk_at(row, table, bounds, length, chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """Batch entry, first step, and end of the sequence, of a chunk."""
    if PACKED:
        sequence = tl.load(table + 2 * row).to(tl.int64)
        chunk = tl.load(table + 2 * row + 1).to(tl.int64)
        start = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        batch = sequence * 0
    else:
        batch, chunk = row // chunks, row % chunks
        start = batch * 0
        end = start + length
    return batch, start + chunk * C, end


@triton.jit
def _load(pointer, t, low, high, columns, width, stride, ACC: tl.constexpr):
    """Rows low <= t < high of a tile with neighbouring columns; zero elsewhere."""
    mask = ((t >= low) & (t < high))[:, None] & (columns < width)[None, :]
    return tl.load(pointer + t[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _decays(pointer, t, low, high, columns, width, stride, ACC: tl.constexpr, BONUS: tl.constexpr):
    """Log weights P and R of the steps t within low <= t < high, and their total decay."""
    own = _load(pointer, t, low, high, columns, width, stride, ACC)
    read = own
    if BONUS:
        read = _load(pointer, t - 1, low, high, columns, width, stride, ACC)
    prefix = tl.cumsum(read, 0)
    suffix = tl.cumsum(_load(pointer, t + 1, low, high, columns, width, stride, ACC), 0, reverse=True)
    return prefix, suffix, tl.sum(own, 0)


@triton.jit
def _before(x, BONUS: tl.constexpr):
    """Gradient of a log decay from P's gradient x: it counts in every P at or behind it."""
    later = tl.cumsum(x, 0, reverse=True)
    if BONUS:
        later -= x
    return later


@triton.jit
def _segments(decay, t, i, j, low, high, stride, ACC: tl.constexpr, BONUS: tl.constexpr):
    """Scalar log decay between the step j that writes and the step i that reads, and which pairs there are."""
    own = _load(decay, t - BONUS, low, high, tl.arange(0, 1), 1, stride, ACC)
    return tl.cumsum(tl.where(i[:, None] > j[None, :] + BONUS, own, 0.0), 0)


@tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "V", "DECAY", "REVERSE"])
@triton.jit
def _state_kernel(
    x, y, decay, initial, states, final, first, bounds,
    x_strides, y_strides, d_strides, length, chunks, H, G, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    BONUS: tl.constexpr, REVERSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores the state before each chunk; in REVERSE its gradient behind it. Program: sequence and head, tile."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    sequence, head = pid // H, pid % H
    if PACKED:
        start = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        row, batch = tl.load(first + sequence).to(tl.int64), sequence * 0
    else:
        start = sequence * 0
        end = start + length
        row, batch = sequence * chunks, sequence
    tiles = tl.cdiv(K, BK)
    column = (part % tiles) * BK + tl.arange(0, BK)
    value = (part // tiles) * BV + tl.arange(0, BV)
    at = column[:, None] * V + value[None, :]
    inside = (column < K)[:, None] & (value < V)[None, :]
    x += batch * x_strides[0] + (head // (H // G)) * x_strides[2]
    y += batch * y_strides[0] + head * y_strides[2]
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
    state = tl.zeros((BK, BV), ACC)
    if initial is not None:
        state += tl.load(initial + pid * K * V + at, mask=inside, other=0.0).to(ACC)

    count = tl.cdiv(end - start, C)
    for step in range(count):
        chunk = step
        if REVERSE:
            chunk = count - 1 - step
        to = states + ((row + chunk) * H + head) * K * V + at
        tl.store(to, state.to(states.dtype.element_ty), mask=inside)
        low = start + chunk * C
        high = tl.minimum(low + C, end)
        t = low + tl.arange(0, C)
        xt = _load(x, t, low, high, column, K, x_strides[1], ACC)
        yt = _load(y, t, low, high, value, V, y_strides[1], ACC)
        if DECAY != NONE:
            if DECAY == CHANNEL:
                prefix, suffix, total = _decays(decay, t, low, high, column, K, d_strides[1], ACC, BONUS)
            else:
                prefix, suffix, total = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, BONUS)
            if REVERSE:
                xt *= tl.exp(prefix)
            else:
                xt *= tl.exp(suffix)
            state *= tl.exp(total)[:, None]
        state += dot(tl.trans(xt * scale), yt, MODE)
    tl.store(final + pid * K * V + at, state, mask=inside)


@tuned([{"num_warps": 8, "num_stages": 2}], key=["K", "DECAY"])
@triton.jit
def _score_kernel(
    q, k, decay, bonus, scores, table, bounds,
    q_strides, k_strides, d_strides, length, chunks, H, G, K,
    scale: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr,
    PACKED: tl.constexpr, BONUS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The weight of value j in output i, both in one chunk. Program: chunk and head, block of ROWS outputs.

    Per channel the decay does not factor out of the product over channels: ROWS is 16, the values before the block are
    weighted with both sides decayed to the block's start, and the block itself is computed column by column.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) * ROWS
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    q += batch * q_strides[0] + (head // (H // G)) * q_strides[2]
    k += batch * k_strides[0] + (head // (H // G)) * k_strides[2]
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
    i, j = block + tl.arange(0, ROWS), tl.arange(0, C).to(tl.int64)
    start, high = low + block, tl.minimum(low + C, end)
    acc = tl.zeros((ROWS, C), ACC)
    diagonal = tl.zeros((ROWS,), ACC)
    for c in range(0, K, BK):
        column = c + tl.arange(0, BK)
        qt = _load(q, low + i, low, high, column, K, q_strides[1], ACC)
        kt = _load(k, low + j, low, high, column, K, k_strides[1], ACC)
        if BONUS:
            own = _load(k, low + i, low, high, column, K, k_strides[1], ACC)
            with_bonus = tl.load(bonus + head * K + column, mask=column < K, other=0.0).to(ACC)
            diagonal += tl.sum(qt * own * with_bonus[None, :], 1)
        if DECAY == CHANNEL:
            prefix = tl.cumsum(_load(decay, low + i - BONUS, start, high, column, K, d_strides[1], ACC), 0)
            until = tl.minimum(start, high)
            suffix = tl.cumsum(_load(decay, low + j + 1, low, until, column, K, d_strides[1], ACC), 0, reverse=True)
            kt = tl.where((j < block)[:, None], kt * tl.exp(suffix), 0.0)
            acc += dot(qt * tl.exp(prefix), tl.trans(kt), MODE)
            between = tl.zeros((ROWS, BK), ACC)
            place = tl.arange(0, ROWS)
            gates = decay + start * d_strides[1] + column
            others = k + start * k_strides[1] + column
            inside, left = column < K, high - start
            filled = tl.minimum(left, ROWS)
            for back in range(filled):
                s = filled - 1 - back
                gate = tl.load(gates + (s + 1) * d_strides[1], mask=inside & (s + 1 < left), other=0.0).to(ACC)
                between += tl.where(place[:, None] > s + BONUS, gate[None, :], 0.0)
                other = tl.load(others + s * k_strides[1], mask=inside & (s < left), other=0.0).to(ACC)
                weight = tl.sum(qt * other[None, :] * tl.exp(between), 1)
                acc += tl.where((j == block + s)[None, :], weight[:, None], 0.0)
        else:
            acc += dot(qt, tl.trans(kt), MODE)
    if DECAY == SCALAR:
        acc *= tl.exp(_segments(decay, low + i, i, j, low, high, d_strides[1], ACC, BONUS))
    acc = tl.where(i[:, None] >= j[None, :] + BONUS, acc, 0.0)
    if BONUS:
        acc += tl.where(i[:, None] == j[None, :], diagonal[:, None], 0.0)
    tl.store(scores + (pid * C + i[:, None]) * C + j[None, :], (acc * scale).to(scores.dtype.element_ty))


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY", "REVERSE"])
@triton.jit
def _output_kernel(
    x, y, decay, scores, states, out, table, bounds,
    x_strides, y_strides, d_strides, length, chunks, H, G, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    BONUS: tl.constexpr, REVERSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """scores @ v + q @ state; in REVERSE scoresᵀ @ do + k @ state gradient. Program: chunk and head, tile of values."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    high = tl.minimum(low + C, end)
    x += batch * x_strides[0] + (head // (H // G)) * x_strides[2]
    y += batch * y_strides[0] + head * y_strides[2]
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
    t = low + tl.arange(0, C)
    acc = tl.zeros((C, BV), ACC)
    for c in range(0, K, BK):
        column = c + tl.arange(0, BK)
        xt = _load(x, t, low, high, column, K, x_strides[1], ACC) * scale
        inside = (column < K)[:, None] & (value < V)[None, :]
        state = tl.load(states + pid * K * V + column[:, None] * V + value[None, :], mask=inside, other=0.0).to(ACC)
        if DECAY != NONE:
            if DECAY == CHANNEL:
                prefix, suffix, _ = _decays(decay, t, low, high, column, K, d_strides[1], ACC, BONUS)
            else:
                prefix, suffix, _ = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, BONUS)
            if REVERSE:
                xt *= tl.exp(suffix)
            else:
                xt *= tl.exp(prefix)
        acc += dot(xt, state, MODE)
    yt = _load(y, t, low, high, value, V, y_strides[1], ACC)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    weight = tl.load(scores + pid * C * C + i * C + j).to(ACC)
    if REVERSE:
        weight = tl.trans(weight)
    acc += dot(weight, yt, MODE)
    to = out + ((batch * length + t[:, None]) * H + head) * V + value[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < high)[:, None] & (value < V)[None, :])


@triton.jit
def _scalar_pairs(qt, kt, grads, decay, t, low, high, stride, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr,
                  BONUS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Gradients of q, k and the log decay from a chunk's scores, for decays that the channels share."""
    i = tl.arange(0, C)
    inside = i[:, None] >= i[None, :] + BONUS
    pairs = tl.where(inside, tl.load(grads + i[:, None] * C + i[None, :]).to(ACC), 0.0)
    dd = tl.zeros((C, 1), ACC)
    if DECAY == SCALAR:
        pairs *= tl.exp(_segments(decay, t, i, i, low, high, stride, ACC, BONUS))
        across = _before(pairs * dot(qt, tl.trans(kt), MODE), BONUS)
        dd += tl.sum(tl.where(i[:, None] > i[None, :], across, 0.0), 1)[:, None]
    return dot(pairs, kt, MODE), dot(tl.trans(pairs), qt, MODE), dd


@triton.jit
def _channel_pairs(q, k, qt, kt, grads, decay, t, low, high, column, width, q_stride, k_stride, stride,
                   C: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, BONUS: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """The same for a decay per channel: blocks of 16 against all before them, then each block with itself."""
    i = tl.arange(0, C)
    dq, dk, dd = tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC)
    for block in range(BLOCK, C, BLOCK):
        start = low + block
        stop, until = tl.minimum(start + BLOCK, high), tl.minimum(start, high)
        prefix = tl.cumsum(_load(decay, t - BONUS, start, stop, column, width, stride, ACC), 0)
        suffix = tl.cumsum(_load(decay, t + 1, low, until, column, width, stride, ACC), 0, reverse=True)
        reads = (i >= block) & (i < block + BLOCK)
        writes = i < block
        prefix = tl.where(reads[:, None], tl.exp(prefix), 0.0)
        suffix = tl.where(writes[:, None], tl.exp(suffix), 0.0)
        across = tl.load(grads + i[:, None] * C + i[None, :], mask=reads[:, None] & writes[None, :], other=0.0).to(ACC)
        dq += dot(across, kt * suffix, MODE) * prefix
        into_k = dot(tl.trans(across), qt * prefix, MODE) * suffix
        dk += into_k
        into_k *= kt
        dd += tl.where(writes[:, None], tl.cumsum(into_k, 0) - into_k, 0.0)
    x = qt * dq
    y = tl.zeros((C, BK), ACC)

    # Within the blocks: i is the step's place in its block; each turn takes one other place of all blocks at once.
    i = i % BLOCK
    base = t - i
    inside, left = (column < width)[None, :], (high - base)[:, None]
    gates = decay + base[:, None] * stride + column[None, :]
    keys = k + base[:, None] * k_stride + column[None, :]
    pairs = grads + tl.arange(0, C) * C + tl.arange(0, C) - i
    filled = tl.minimum(high - low, BLOCK)
    between = tl.zeros((C, BK), ACC)
    for back in range(filled):
        j = filled - 1 - back
        gate = tl.load(gates + (j + 1) * stride, mask=inside & (j + 1 < left), other=0.0).to(ACC)
        between += tl.where((i > j + BONUS)[:, None], gate, 0.0)
        pair = tl.load(pairs + j, mask=i >= j + BONUS, other=0.0).to(ACC)
        key = tl.load(keys + j * k_stride, mask=inside & (j < left), other=0.0).to(ACC)
        into_q = pair[:, None] * key * tl.exp(between)
        dq += into_q
        x += qt * into_q
    queries = q + base[:, None] * q_stride + column[None, :]
    pairs = grads + (tl.arange(0, C) - i) * C + tl.arange(0, C)
    between = tl.zeros((C, BK), ACC)
    for j in range(filled):
        gate = tl.load(gates + (j - BONUS) * stride, mask=inside & (j < left) & (j >= BONUS), other=0.0).to(ACC)
        between += tl.where((j > i + BONUS)[:, None], gate, 0.0)
        pair = tl.load(pairs + j * C, mask=j >= i + BONUS, other=0.0).to(ACC)
        query = tl.load(queries + j * q_stride, mask=inside & (j < left), other=0.0).to(ACC)
        into_k = pair[:, None] * query * tl.exp(between)
        dk += into_k
        y += kt * into_k
    # Of a block's pairs, a decay counts in those that read at or behind it, less those that also write there.
    blocks: tl.constexpr = (C // BLOCK, BLOCK, BK)
    later = tl.cumsum(tl.reshape(x - y, blocks), 1, reverse=True)
    dd += tl.reshape(later, (C, BK))
    if BONUS:
        dd -= x
    return dq, dk, dd


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY"])
@triton.jit
def _gradient_kernel(
    q, k, v, do, decay, bonus, states, state_grads, score_grads, dq, dk, dd, du, table, bounds,
    q_strides, k_strides, v_strides, do_strides, d_strides, length, chunks, tokens, H, G, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    BONUS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, the log decay and the bonus, each per head. Program: chunk and head, tile of channels."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    high = tl.minimum(low + C, end)
    q += batch * q_strides[0] + (head // (H // G)) * q_strides[2]
    k += batch * k_strides[0] + (head // (H // G)) * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    do += batch * do_strides[0] + head * do_strides[2]
    t = low + tl.arange(0, C)
    column = part * BK + tl.arange(0, BK)
    into_q, into_k, kept = tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC), tl.zeros((BK,), ACC)
    for c in range(0, V, BV):
        value = c + tl.arange(0, BV)
        at = pid * K * V + column[:, None] * V + value[None, :]
        inside = (column < K)[:, None] & (value < V)[None, :]
        state = tl.load(states + at, mask=inside, other=0.0).to(ACC)
        state_grad = tl.load(state_grads + at, mask=inside, other=0.0).to(ACC)
        into_q += dot(_load(do, t, low, high, value, V, do_strides[1], ACC), tl.trans(state), MODE)
        into_k += dot(_load(v, t, low, high, value, V, v_strides[1], ACC), tl.trans(state_grad), MODE)
        kept += tl.sum(state * state_grad, 1)

    qt = _load(q, t, low, high, column, K, q_strides[1], ACC)
    kt = _load(k, t, low, high, column, K, k_strides[1], ACC)
    grads = score_grads + pid * C * C
    into_q *= scale
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
        if DECAY == CHANNEL:
            prefix, suffix, total = _decays(decay, t, low, high, column, K, d_strides[1], ACC, BONUS)
        else:
            prefix, suffix, total = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, BONUS)
        into_q *= tl.exp(prefix)
        into_k *= tl.exp(suffix)
        x, y = qt * into_q, kt * into_k
        if DECAY == SCALAR:
            x, y, kept = tl.sum(x, 1)[:, None], tl.sum(y, 1)[:, None], tl.sum(kept, 0)
        through = _before(x, BONUS) + tl.cumsum(y, 0) - y + (kept * tl.exp(total))[None, :]
    if DECAY == CHANNEL:
        more_q, more_k, pairs = _channel_pairs(
            q, k, qt, kt, grads, decay, t, low, high, column, K, q_strides[1], k_strides[1], d_strides[1],
            C, BK, MODE, BONUS, ACC,
        )  # fmt: skip
    else:
        more_q, more_k, pairs = _scalar_pairs(
            qt, kt, grads, decay, t, low, high, d_strides[1], C, DECAY, MODE, BONUS, ACC
        )
    into_q += more_q
    into_k += more_k
    if BONUS:
        own = tl.load(grads + tl.arange(0, C) * (C + 1)).to(ACC)[:, None]
        weight = tl.load(bonus + head * K + column, mask=column < K, other=0.0).to(ACC)[None, :]
        into_q += own * weight * kt
        into_k += own * weight * qt
        tl.store(du + pid * K + column, tl.sum(own * qt * kt, 0), mask=column < K)
    inside = (t < high)[:, None] & (column < K)[None, :]
    at = (batch * length + t[:, None]) * H + head
    tl.store(dq + at * K + column[None, :], into_q.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + at * K + column[None, :], into_k.to(dk.dtype.element_ty), mask=inside)
    if DECAY == CHANNEL:
        tl.store(dd + at * K + column[None, :], (through + pairs).to(dd.dtype.element_ty), mask=inside)
    elif DECAY == SCALAR:
        tl.store(dd + part * tokens * H + at, through + pairs, mask=(t < high)[:, None])


def _largest(dtype: torch.dtype) -> int:
    # With float32 operands, which float16 needs for their range, half as much fits registers and AMD's shared memory.
    return 64 if dtype == torch.bfloat16 or interpreting() else 32


def _chunking(v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Steps in a chunk, chunks in a sequence of full length, sequences, chunks in all; sizes may be symbolic."""
    batch, length = v.shape[:2]
    size = 16 if length <= 16 else 32 if length <= 32 else _largest(v.dtype)
    chunks = (length + size - 1) // size
    if cu_seqlens is None:
        return size, chunks, batch, batch * chunks
    sequences = cu_seqlens.shape[0] - 1
    return size, chunks, sequences, length // size + sequences


def _stored(dtype: torch.dtype) -> torch.dtype:
    # What only dots read is stored in the dtype in which they read it.
    return dtype if dtype == torch.bfloat16 and not interpreting() else accumulate_dtype(dtype)


class _Call:
    """The launches of one call, and what they share: how the steps are cut into chunks, tiles, the kernels' modes."""

    def __init__(self, q, k, v, decay, bonus, cu_seqlens):
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.form, self.decay = NONE.value, None
        if decay is not None:
            self.form = (SCALAR if decay.dim() == 3 else CHANNEL).value
            self.decay = decay if decay.dim() == 3 else unit_stride(decay)
        self.bonus = None if bonus is None else bonus.contiguous()
        self.batch, self.length, self.heads, self.width_v = v.shape
        self.width = q.shape[-1]
        self.size, self.chunks, self.sequences, self.rows = _chunking(v, cu_seqlens)
        self.table = self.first = self.bounds = None
        if cu_seqlens is not None:
            self.table, self.first = chunk_table(cu_seqlens, self.size, self.length)
            # The table's last rows name a sequence behind the last one, which ends where it starts.
            self.bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
        self.dtype = accumulate_dtype(v.dtype)
        self.stored = _stored(v.dtype)
        self.bv = tile(self.width_v, _largest(v.dtype))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype or self.dtype)

    def _tile(self, width: int, form: int) -> int:
        # A decay per channel is a tile of its own, with its sums: narrower, they stay in registers.
        return tile(width, 32 if form == CHANNEL.value else _largest(self.v.dtype))

    def _common(self, scale: float, x: Tensor, form: int, reads: bool) -> dict[str, object]:
        # A bonus changes where the state is read, and nothing where it is written: that kernel is then the same.
        return {
            "d_strides": (0, 0, 0) if form == NONE.value else self.decay.stride()[:3],
            "length": self.length, "chunks": self.chunks, "bounds": self.bounds,
            "H": self.heads, "G": x.shape[2], "K": x.shape[3], "scale": scale, "C": self.size, "DECAY": form,
            "MODE": dot_mode(self.v.dtype, wide=True), "PACKED": self.table is not None,
            "BONUS": int(reads and self.bonus is not None), "BK": self._tile(x.shape[3], form),
        }  # fmt: skip

    def states(self, x, y, initial, scale: float, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state at each chunk, (rows, h, k, v), and behind the last, (n, h, k, v)."""
        shape = (self.heads, self.width, self.width_v)
        states, final = self.new(self.rows, *shape, dtype=self.stored), self.new(self.sequences, *shape)
        tiles = triton.cdiv(self.width, self._tile(self.width, self.form)) * triton.cdiv(self.width_v, self.bv)
        _state_kernel[grid(self.sequences * self.heads, tiles)](
            x, y, self.decay, initial, states, final, self.first, x_strides=x.stride()[:3], y_strides=y.stride()[:3],
            V=self.width_v, REVERSE=reverse, BV=self.bv, **self._common(scale, x, self.form, reads=reverse),
        )  # fmt: skip
        return states, final

    def scores(self, q, k, scale: float, decayed: bool = True) -> Tensor:
        """(rows, h, size, size): the decayed products of q and k within a chunk, or the plain ones."""
        form, bonus = (self.form, self.bonus) if decayed else (NONE.value, None)
        scores = self.new(self.rows, self.heads, self.size, self.size, dtype=self.stored)
        height = BLOCK.value if form == CHANNEL.value else self.size
        _score_kernel[grid(self.rows * self.heads, self.size // height)](
            q, k, self.decay, bonus, scores, self.table, q_strides=q.stride()[:3], k_strides=k.stride()[:3],
            ROWS=height, **self._common(scale, q, form, reads=decayed),
        )  # fmt: skip
        return scores

    def outputs(self, x, y, scores, states, scale: float, reverse: bool) -> Tensor:
        """(b, t, h, v) in v's dtype."""
        out = self.new(*self.v.shape, dtype=self.v.dtype)
        _output_kernel[grid(self.rows * self.heads, triton.cdiv(self.width_v, self.bv))](
            x, y, self.decay, scores, states, out, self.table, x_strides=x.stride()[:3], y_strides=y.stride()[:3],
            V=self.width_v, REVERSE=reverse, BV=self.bv, **self._common(scale, x, self.form, reads=not reverse),
        )  # fmt: skip
        return out

    def gradients(self, do, states, state_grads, score_grads, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q, k (both (b, t, g, k)), of the decay and of the bonus (empty where there is none)."""
        b, t, h, g, k = self.batch, self.length, self.heads, self.q.shape[2], self.width
        common = self._common(scale, self.q, self.form, reads=True)
        # Half as wide as elsewhere, since q, k and their gradients are all kept.
        common["BK"] = max(16, self._tile(k, self.form) // 2)
        parts = triton.cdiv(k, common["BK"])
        dq, dk = (self.new(b, t, h, k, dtype=self.q.dtype if g == h else self.dtype) for _ in range(2))
        shapes = {NONE.value: (0,), SCALAR.value: (parts, b, t, h), CHANNEL.value: (b, t, h, k)}
        dd = self.new(*shapes[self.form])
        du = self.new(*((0,) if self.bonus is None else (self.rows, h, k)))
        _gradient_kernel[grid(self.rows * h, parts)](
            self.q, self.k, self.v, do, self.decay, self.bonus, states, state_grads, score_grads, dq, dk, dd, du,
            self.table, q_strides=self.q.stride()[:3], k_strides=self.k.stride()[:3], v_strides=self.v.stride()[:3],
            do_strides=do.stride()[:3], tokens=b * t, V=self.width_v, BV=self.bv, **common,
        )  # fmt: skip
        if g != h:
            dq, dk = (x.view(b, t, g, h // g, k).sum(3).to(self.q.dtype) for x in (dq, dk))
        if self.form == SCALAR.value:
            dd = dd.sum(0)
        return dq, dk, dd, du if self.bonus is None else du.sum(0)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the last state, and the scores, which the backward pass takes."""
    call = _Call(q, k, v, decay, bonus, cu_seqlens)
    initial = None if initial_state is None else initial_state.contiguous()
    with on_device_of(v):
        states, final = call.states(call.k, call.v, initial, 1.0, reverse=False)
        scores = call.scores(call.q, call.k, scale)
        return call.outputs(call.q, call.v, scores, states, scale, reverse=False), final, scores


def _launch_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scores: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(q, k, v, decay, bonus, cu_seqlens)
    do, dfinal = do.contiguous(), dfinal.contiguous()
    initial = None if initial_state is None else initial_state.contiguous()
    with on_device_of(v):
        # Recomputed, since a state for every chunk is more than the inputs they come from.
        states, _ = call.states(call.k, call.v, initial, 1.0, reverse=False)
        state_grads, into_initial = call.states(call.q, do, dfinal, scale, reverse=True)
        dv = call.outputs(call.k, do, scores, state_grads, 1.0, reverse=True)
        score_grads = call.scores(do, call.v, scale, decayed=False)
        dq, dk, dd, du = call.gradients(do, states, state_grads, score_grads, scale)
    dd, du = (g if x is None else g.to(x.dtype) for g, x in ((dd, decay), (du, bonus)))
    return dq, dk, dv, dd, du, call.new(0) if initial_state is None else into_initial


_forward = torch.library.custom_op("omnimix::gated_linear_triton", _launch_forward, mutates_args=())
_backward = torch.library.custom_op("omnimix::gated_linear_triton_backward", _launch_backward, mutates_args=())


@_forward.register_fake
@launches(_launch_forward)
def _(q, k, v, decay, bonus, initial_state, cu_seqlens, scale):
    size, _, sequences, rows = _chunking(v, cu_seqlens)
    state = v.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=accumulate_dtype(v.dtype))
    return v.new_empty(v.shape), state, v.new_empty(rows, v.shape[2], size, size, dtype=_stored(v.dtype))


@_backward.register_fake
@launches(_launch_backward)
def _(do, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, scores, scale):
    def like(x):
        return v.new_empty(0, dtype=accumulate_dtype(v.dtype)) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, decay, bonus, initial_state))


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, do, dfinal, dscores):
    grads = torch.ops.omnimix.gated_linear_triton_backward(do, dfinal, *ctx.saved_tensors, ctx.scale)
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def gated_linear_triton(
    *, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(v.shape[:3])
    if initial_state is not None:
        initial_state = initial_state.to(accumulate_dtype(v.dtype))
    output, state, _ = torch.ops.omnimix.gated_linear_triton(q, k, v, decay, bonus, initial_state, cu_seqlens, scale)
    return output, state
