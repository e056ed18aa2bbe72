"""Chunkwise recurrences with a matrix state: the Triton kernels that `gated_linear` and `delta_rule` share.

A sequence is cut into chunks of C steps. `_state` walks over the chunks and keeps the state at the boundary of
each; everything else is parallel over chunks: `_score` computes the C x C weights of the values within a chunk,
`_output_kernel` adds to their product what the state contributes (GLA, arXiv 2312.06635, sections 4.1 and 4.2).
Backward, the same three kernels serve: the state's gradient walks the other way with (q, do) in place of (k, v), the
scores' gradient is a score of (do, v), and dv is an output of (k, do); `_gradient_kernel` computes the rest.

Exponents are sums of log decays over a range of steps, always added up from the range itself: no exponent is positive
and none is the difference of two large sums. `prefix` is the sum from the start of a chunk (or block) to the step that
reads the state, `suffix` the sum from after a step to the end. An EXCLUSIVE read takes the state before the step's own
decay and update, so the prefix leaves that decay out.

`triton_launches` holds the launchers.
"""

import triton
import triton.language as tl

from .tools import tuned
from .triton_tools import dot

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
def _of(pointer, strides, batch, head):
    """Where one batch entry's and head's steps begin; strides: of batch, step, head, and how many heads share one."""
    return pointer + batch * strides[0] + (head // strides[3]) * strides[2]


@triton.jit
def _load(pointer, t, low, high, columns, width, stride, ACC: tl.constexpr):
    """Rows low <= t < high of a tile with neighbouring columns; zero elsewhere."""
    mask = ((t >= low) & (t < high))[:, None] & (columns < width)[None, :]
    return tl.load(pointer + t[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _decays(pointer, t, low, high, columns, width, stride, ACC: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Log weights P and R of the steps t within low <= t < high, and their total decay."""
    own = _load(pointer, t, low, high, columns, width, stride, ACC)
    read = own
    if EXCLUSIVE:
        read = _load(pointer, t - 1, low, high, columns, width, stride, ACC)
    prefix = tl.cumsum(read, 0)
    suffix = tl.cumsum(_load(pointer, t + 1, low, high, columns, width, stride, ACC), 0, reverse=True)
    return prefix, suffix, tl.sum(own, 0)


@triton.jit
def _before(x, EXCLUSIVE: tl.constexpr):
    """Gradient of a log decay from P's gradient x: it counts in every P at or after it."""
    later = tl.cumsum(x, 0, reverse=True)
    if EXCLUSIVE:
        later -= x
    return later


@triton.jit
def _segments(decay, t, i, j, low, high, stride, ACC: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Scalar log decay between the step j that writes and the step i that reads, and which pairs there are."""
    own = _load(decay, t - EXCLUSIVE, low, high, tl.arange(0, 1), 1, stride, ACC)
    return tl.cumsum(tl.where(i[:, None] > j[None, :] + EXCLUSIVE, own, 0.0), 0)


@triton.jit
def _state(
    x, y, decay, more, values, weights, base, initial, states, final, first, bounds,
    x_strides, y_strides, d_strides, m_strides, length, chunks, H, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores the state before each chunk; in REVERSE its gradient after it. Program: sequence and head, tile.

    The state gains scale * xᵀ y and, where there is `more`, moreᵀ values. With `weights` the values depend on the
    state: they are weights @ state + base, and are stored; without y they take its place.
    """
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
    x = _of(x, x_strides, batch, head)
    if y is not None:
        y = _of(y, y_strides, batch, head)
    if more is not None:
        more = _of(more, m_strides, batch, head)
    if values is not None:
        values += (batch * length * H + head) * V
    if weights is not None:
        weights += (batch * length * H + head) * K
        base += (batch * length * H + head) * V
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
        if weights is not None:
            found = dot(_load(weights, t, low, high, column, K, H * K, ACC), state, MODE)
            found += _load(base, t, low, high, value, V, H * V, ACC)
            to = values + t[:, None] * (H * V) + value[None, :]
            tl.store(to, found.to(values.dtype.element_ty), mask=(t < high)[:, None] & (value < V)[None, :])
        elif values is not None:
            found = _load(values, t, low, high, value, V, H * V, ACC)
        xt = _load(x, t, low, high, column, K, x_strides[1], ACC)
        if y is not None:
            yt = _load(y, t, low, high, value, V, y_strides[1], ACC)
        else:
            yt = found
        if DECAY != NONE:
            if DECAY == CHANNEL:
                prefix, suffix, total = _decays(decay, t, low, high, column, K, d_strides[1], ACC, EXCLUSIVE)
            else:
                prefix, suffix, total = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, EXCLUSIVE)
            if REVERSE:
                xt *= tl.exp(prefix)
            else:
                xt *= tl.exp(suffix)
            state *= tl.exp(total)[:, None]
        state += dot(tl.trans(xt * scale), yt, MODE)
        if more is not None:
            # Only now, so that the decays of x are not kept together with those of more.
            xt = _load(more, t, low, high, column, K, m_strides[1], ACC)
            if DECAY != NONE:
                if DECAY == CHANNEL:
                    prefix, suffix, _ = _decays(decay, t, low, high, column, K, d_strides[1], ACC, 1)
                else:
                    prefix, suffix, _ = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, 1)
                if REVERSE:
                    xt *= tl.exp(prefix)
                else:
                    xt *= tl.exp(suffix)
            state += dot(tl.trans(xt), found, MODE)
    tl.store(final + pid * K * V + at, state, mask=inside)


_state_kernel = tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "V", "DECAY", "REVERSE"])(_state)
# For tiles of more channels, of which a thread keeps fewer where there are more threads.
_wide_state_kernel = tuned([{"num_warps": 8, "num_stages": 2}], key=["K", "V", "DECAY", "REVERSE"])(_state)


@triton.jit
def _between(place, own, EXCLUSIVE: tl.constexpr):
    """Log decay per channel between the step j that writes and the step i that reads: (i, j, channels).

    own: the log decays of the steps i, in an EXCLUSIVE read of the steps before them.
    """
    later = place[:, None, None] > place[None, :, None] + EXCLUSIVE
    return tl.cumsum(tl.where(later, own[:, None, :], 0.0), 0)


@triton.jit
def _score(
    q, k, decay, bonus, scores, table, bounds,
    q_strides, k_strides, d_strides, length, chunks, H, K,
    scale: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr,
    PACKED: tl.constexpr, EXCLUSIVE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The weight of value j in output i, both in one chunk. Program: chunk and head, block of ROWS outputs.

    Per channel the decay does not factor out of the product over channels: ROWS is 16, the values before the block are
    weighted with both sides decayed to the block's start, and the block itself pair by pair.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) * ROWS
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    q = _of(q, q_strides, batch, head)
    k = _of(k, k_strides, batch, head)
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
    i, j = block + tl.arange(0, ROWS), tl.arange(0, C).to(tl.int64)
    start, high = low + block, tl.minimum(low + C, end)
    acc = tl.zeros((ROWS, C), ACC)
    square = tl.zeros((ROWS, BLOCK), ACC)
    diagonal = tl.zeros((ROWS,), ACC)
    for c in range(0, K, BK):
        column = c + tl.arange(0, BK)
        qt = _load(q, low + i, low, high, column, K, q_strides[1], ACC)
        kt = _load(k, low + j, low, high, column, K, k_strides[1], ACC)
        if bonus is not None:
            same = _load(k, low + i, low, high, column, K, k_strides[1], ACC)
            weight = tl.load(bonus + head * K + column, mask=column < K, other=0.0).to(ACC)
            diagonal += tl.sum(qt * same * weight[None, :], 1)
        if DECAY == CHANNEL:
            own = _load(decay, low + i - EXCLUSIVE, start, high, column, K, d_strides[1], ACC)
            prefix = tl.cumsum(own, 0)
            until = tl.minimum(start, high)
            suffix = tl.cumsum(_load(decay, low + j + 1, low, until, column, K, d_strides[1], ACC), 0, reverse=True)
            kt = tl.where((j < block)[:, None], kt * tl.exp(suffix), 0.0)
            acc += dot(qt * tl.exp(prefix), tl.trans(kt), MODE)
            between = _between(tl.arange(0, BLOCK), own, EXCLUSIVE)
            kt = _load(k, low + i, low, high, column, K, k_strides[1], ACC)
            square += tl.sum(qt[:, None, :] * kt[None, :, :] * tl.exp(between), 2)
        else:
            acc += dot(qt, tl.trans(kt), MODE)
    if DECAY == CHANNEL:
        here = tl.arange(0, C // BLOCK) * BLOCK == block
        acc += tl.reshape(tl.where(here[None, :, None], square[:, None, :], 0.0), (ROWS, C))
    elif DECAY == SCALAR:
        acc *= tl.exp(_segments(decay, low + i, i, j, low, high, d_strides[1], ACC, EXCLUSIVE))
    acc = tl.where(i[:, None] >= j[None, :] + EXCLUSIVE, acc, 0.0)
    if bonus is not None:
        acc += tl.where(i[:, None] == j[None, :], diagonal[:, None], 0.0)
    tl.store(scores + (pid * C + i[:, None]) * C + j[None, :], (acc * scale).to(scores.dtype.element_ty))


_score_kernel = tuned([{"num_warps": 8, "num_stages": 2}], key=["K", "DECAY"])(_score)
# For decays per channel, of which a program has a block of ROWS.
_block_score_kernel = tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "DECAY"])(_score)


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY", "REVERSE"])
@triton.jit
def _output_kernel(
    x, y, decay, scores, states, more_scores, more, out, table, bounds,
    x_strides, y_strides, d_strides, m_strides, length, chunks, H, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """scores @ y + x @ state, and more_scores @ more; in REVERSE with transposed scores and the state's gradient.

    Program: chunk and head, tile of values.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    high = tl.minimum(low + C, end)
    x = _of(x, x_strides, batch, head)
    y = _of(y, y_strides, batch, head)
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
                prefix, suffix, _ = _decays(decay, t, low, high, column, K, d_strides[1], ACC, EXCLUSIVE)
            else:
                prefix, suffix, _ = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, EXCLUSIVE)
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
    if more is not None:
        yt = _load(_of(more, m_strides, batch, head), t, low, high, value, V, m_strides[1], ACC)
        weight = tl.load(more_scores + pid * C * C + i * C + j).to(ACC)
        if REVERSE:
            weight = tl.trans(weight)
        acc += dot(weight, yt, MODE)
    to = out + ((batch * length + t[:, None]) * H + head) * V + value[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < high)[:, None] & (value < V)[None, :])


@triton.jit
def _give(pointer, x, mask, ADD: tl.constexpr):
    """Stores x, or adds it to what is stored."""
    if ADD:
        x += tl.load(pointer, mask=mask, other=0.0).to(x.dtype)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scalar_pairs(qt, kt, grads, decay, t, low, high, stride, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr,
                  EXCLUSIVE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Gradients of q, k and the log decay from a chunk's scores, for decays that the channels share."""
    i = tl.arange(0, C)
    inside = i[:, None] >= i[None, :] + EXCLUSIVE
    pairs = tl.where(inside, tl.load(grads + i[:, None] * C + i[None, :]).to(ACC), 0.0)
    dd = tl.zeros((C, 1), ACC)
    if DECAY == SCALAR:
        pairs *= tl.exp(_segments(decay, t, i, i, low, high, stride, ACC, EXCLUSIVE))
        across = _before(pairs * dot(qt, tl.trans(kt), MODE), EXCLUSIVE)
        dd += tl.sum(tl.where(i[:, None] > i[None, :], across, 0.0), 1)[:, None]
    return dot(pairs, kt, MODE), dot(tl.trans(pairs), qt, MODE), dd


@triton.jit
def _channel_pairs(q, k, qt, kt, grads, decay, t, low, high, column, width, q_stride, k_stride, stride,
                   C: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """The same for a decay per channel: blocks of 16 against all before them, then each block with itself."""
    i = tl.arange(0, C)
    dq, dk, dd = tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC)
    for block in range(BLOCK, C, BLOCK):
        start = low + block
        stop, until = tl.minimum(start + BLOCK, high), tl.minimum(start, high)
        prefix = tl.cumsum(_load(decay, t - EXCLUSIVE, start, stop, column, width, stride, ACC), 0)
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
    # Within the blocks.
    within = tl.zeros((C, BK), ACC)
    place = tl.arange(0, BLOCK)
    for block in range(0, C, BLOCK):
        at, start = block + place, low + block
        own = _load(decay, low + at - EXCLUSIVE, start, high, column, width, stride, ACC)
        weight = tl.load(grads + at[:, None] * C + at[None, :]).to(ACC)
        weight = tl.where(place[:, None] >= place[None, :] + EXCLUSIVE, weight, 0.0)
        weight = weight[:, :, None] * tl.exp(_between(place, own, EXCLUSIVE))
        into_q = tl.sum(weight * _load(k, low + at, start, high, column, width, k_stride, ACC)[None, :, :], 1)
        into_k = tl.sum(weight * _load(q, low + at, start, high, column, width, q_stride, ACC)[:, None, :], 0)
        here = (tl.arange(0, C // BLOCK) * BLOCK == block)[:, None, None]
        dq += tl.reshape(tl.where(here, into_q[None, :, :], 0.0), (C, BK))
        within += tl.reshape(tl.where(here, into_k[None, :, :], 0.0), (C, BK))
    dk += within
    x, y = qt * dq, kt * within
    # Of a block's pairs, a decay counts in those that read at or after it, less those that also write there.
    blocks: tl.constexpr = (C // BLOCK, BLOCK, BK)
    later = tl.cumsum(tl.reshape(x - y, blocks), 1, reverse=True)
    dd += tl.reshape(later, (C, BK))
    if EXCLUSIVE:
        dd -= x
    return dq, dk, dd


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY"])
@triton.jit
def _gradient_kernel(
    q, k, v, do, decay, bonus, states, state_grads, score_grads, dq, dk, dd, du, table, bounds,
    q_strides, k_strides, v_strides, do_strides, d_strides, length, chunks, tokens, H, K, V,
    scale: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
    EXCLUSIVE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ADD_Q: tl.constexpr, ADD_K: tl.constexpr,
    ADD_D: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, the log decay and the bonus, each per head. Program: chunk and head, tile of channels.

    Without states, or without their gradients, only what goes through the other and the scores. ADD: to what the
    buffer holds already. What the decays have of the state that a chunk keeps is in the first call, without ADD_D.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    high = tl.minimum(low + C, end)
    q = _of(q, q_strides, batch, head)
    k = _of(k, k_strides, batch, head)
    v = _of(v, v_strides, batch, head)
    do = _of(do, do_strides, batch, head)
    t = low + tl.arange(0, C)
    column = part * BK + tl.arange(0, BK)
    into_q, into_k, kept = tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC), tl.zeros((BK,), ACC)
    for c in range(0, V, BV):
        value = c + tl.arange(0, BV)
        at = pid * K * V + column[:, None] * V + value[None, :]
        inside = (column < K)[:, None] & (value < V)[None, :]
        if states is not None:
            state = tl.load(states + at, mask=inside, other=0.0).to(ACC)
            into_q += dot(_load(do, t, low, high, value, V, do_strides[1], ACC), tl.trans(state), MODE)
        if state_grads is not None:
            state_grad = tl.load(state_grads + at, mask=inside, other=0.0).to(ACC)
            into_k += dot(_load(v, t, low, high, value, V, v_strides[1], ACC), tl.trans(state_grad), MODE)
            if not ADD_D:
                kept += tl.sum(state * state_grad, 1)

    qt = _load(q, t, low, high, column, K, q_strides[1], ACC)
    kt = _load(k, t, low, high, column, K, k_strides[1], ACC)
    grads = score_grads + pid * C * C
    into_q *= scale
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
        if DECAY == CHANNEL:
            prefix, suffix, total = _decays(decay, t, low, high, column, K, d_strides[1], ACC, EXCLUSIVE)
        else:
            prefix, suffix, total = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, EXCLUSIVE)
        into_q *= tl.exp(prefix)
        into_k *= tl.exp(suffix)
        x, y = qt * into_q, kt * into_k
        if DECAY == SCALAR:
            x, y, kept = tl.sum(x, 1)[:, None], tl.sum(y, 1)[:, None], tl.sum(kept, 0)
        through = _before(x, EXCLUSIVE) + tl.cumsum(y, 0) - y + (kept * tl.exp(total))[None, :]
    if DECAY == CHANNEL:
        more_q, more_k, pairs = _channel_pairs(
            q, k, qt, kt, grads, decay, t, low, high, column, K, q_strides[1], k_strides[1], d_strides[1],
            C, BK, MODE, EXCLUSIVE, ACC,
        )  # fmt: skip
    else:
        more_q, more_k, pairs = _scalar_pairs(
            qt, kt, grads, decay, t, low, high, d_strides[1], C, DECAY, MODE, EXCLUSIVE, ACC
        )
    into_q += more_q
    into_k += more_k
    if bonus is not None:
        own = tl.load(grads + tl.arange(0, C) * (C + 1)).to(ACC)[:, None]
        weight = tl.load(bonus + head * K + column, mask=column < K, other=0.0).to(ACC)[None, :]
        into_q += own * weight * kt
        into_k += own * weight * qt
        tl.store(du + pid * K + column, tl.sum(own * qt * kt, 0), mask=column < K)
    inside = (t < high)[:, None] & (column < K)[None, :]
    at = (batch * length + t[:, None]) * H + head
    _give(dq + at * K + column[None, :], into_q, inside, ADD_Q)
    _give(dk + at * K + column[None, :], into_k, inside, ADD_K)
    if DECAY == CHANNEL:
        _give(dd + at * K + column[None, :], through + pairs, inside, ADD_D)
    elif DECAY == SCALAR:
        _give(dd + part * tokens * H + at, through + pairs, (t < high)[:, None], ADD_D)
