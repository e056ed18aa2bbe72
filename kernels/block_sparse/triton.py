"""Triton kernels of `block_sparse`: forward, and backward for queries and for keys.

Heads that share both their lists and their keys stand in a lane, and M = (queries of a row, as many as fit) x (heads of
a lane) make the rows of a tile. `_forward_kernel` walks over the listed blocks with an online softmax and
`_query_kernel` walks the same way for dq (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; NSA, arXiv
2502.11089, section 3.4, for the grouping of heads). `_key_kernel` walks, for a block of keys, over the rows whose lists
name it: the lists are inverted by a sort, so that nothing is added atomically.

With N blocks of B keys listed for each of R rows of queries in each of L lanes, and widths K and V:
forward reads N·B·(K + V) elements a tile and computes 2·M·N·B·(K + V) operations on them, M operations per element
read; dq the same reads and 2·M·N·B·(2K + V) operations; dk and dv read M·(K + V + 2) elements and compute
2·M·B·(2K + 2V) operations for each block and tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import (
    accumulate_dtype,
    dot_mode,
    grid,
    interpreting,
    launches,
    on_device_of,
    tile,
    tuned,
    unit_stride,
)
from ..common.triton_tools import dot
from ..custom import custom_op
from .tables import distinct, tables


@triton.jit
def _tile_at(
    row, part, start, stop, positions, lane, batch, position_stride,
    QUERIES: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows: the query, the head, whether there is one, and the query's position."""
    m = tl.arange(0, BM)
    query = tl.load(start + row) + part * QUERIES + m // R
    real = (m < QUERIES * R) & (query < tl.load(stop + row))
    # Positions fit 32 bits, and take half the registers.
    position = tl.load(positions + batch * position_stride + query, mask=real, other=-1).to(tl.int32)
    return query, lane * R + m % R, real, position


@triton.jit
def _rows(pointer, at, real, columns, width, ACC: tl.constexpr):
    """Rows of neighbouring elements that begin at `at`; zeros where they are not real."""
    mask = real[:, None] & (columns < width)[None, :]
    return tl.load(pointer + at[:, None] + columns[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _hide(scores, real, position, key_position, exists, CAUSAL: tl.constexpr):
    seen = real[:, None] & exists[None, :]
    if CAUSAL:
        seen = seen & (key_position[None, :] <= position[:, None])
    return tl.where(seen, scores, float("-inf"))


@tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "V", "BM", "BN"])
@triton.jit
def _forward_kernel(
    q, k, v, blocks, out, norms, start, stop, first, count, key_start, key_stop, key_position, positions,
    q_strides, k_strides, v_strides, block_strides, position_stride, t, N, H, L, F, G, K, V, scale,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, CAUSAL: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of a tile. Program: tile; batch entry and lane."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    batch, lane = tl.program_id(1).to(tl.int64) // L, tl.program_id(1).to(tl.int64) % L
    row = pid // PARTS
    query, head, real, position = _tile_at(
        row, pid % PARTS, start, stop, positions, lane, batch, position_stride, QUERIES, R, BM
    )
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    q_at = batch * q_strides[0] + query * q_strides[1] + head * q_strides[2]
    qt = _rows(q, q_at, real, keys, K, ACC) * scale
    k += batch * k_strides[0] + (lane * G // L) * k_strides[2]
    v += batch * v_strides[0] + (lane * G // L) * v_strides[2]
    blocks += batch * block_strides[0] + row * block_strides[1] + (lane * F // L) * block_strides[2]
    offset, most = tl.load(first + row), tl.load(count + row)
    last = tl.max(position, 0)
    largest = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    summed = tl.zeros((BM, BV), ACC)
    for i in range(N):
        block = tl.load(blocks + i)
        wanted = (block >= 0) & (block < most)
        if CAUSAL:
            wanted = wanted & (block * SIZE <= last)
        if wanted:
            begin = tl.load(key_start + offset + block)
            end = tl.load(key_stop + offset + block)
            place = tl.load(key_position + offset + block).to(tl.int32)
            for c in range(0, SIZE, BN):
                n = c + tl.arange(0, BN)
                exists = (n < SIZE) & (begin + n < end)
                kt = _rows(k, (begin + n) * k_strides[1], exists, keys, K, ACC)
                scores = _hide(dot(qt, tl.trans(kt), MODE), real, position, place + n, exists, CAUSAL)
                higher = tl.maximum(largest, tl.max(scores, 1))
                # What has seen nothing yet stays at minus infinity, from which nothing can be subtracted.
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp(scores - base[:, None])
                shrink = tl.exp(largest - base)
                total = total * shrink + tl.sum(weights, 1)
                vt = _rows(v, (begin + n) * v_strides[1], exists, values, V, ACC)
                summed = summed * shrink[:, None] + dot(weights, vt, MODE)
                largest = higher
    empty = total == 0.0
    summed /= tl.where(empty, 1.0, total)[:, None]
    at = (batch * t + query) * H + head
    inside = real[:, None] & (values < V)[None, :]
    tl.store(out + at[:, None] * V + values[None, :], summed.to(out.dtype.element_ty), mask=inside)
    norm = tl.where(empty, float("inf"), largest + tl.log(tl.where(empty, 1.0, total)))
    tl.store(norms + at, norm, mask=real)


@tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "V", "BM", "BN"])
@triton.jit
def _query_kernel(
    q, k, v, do, blocks, norms, dots, dq, start, stop, first, count, key_start, key_stop, key_position, positions,
    q_strides, k_strides, v_strides, block_strides, position_stride, t, N, H, L, F, G, K, V, scale,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, CAUSAL: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of q for a tile. Program: tile; batch entry and lane."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    batch, lane = tl.program_id(1).to(tl.int64) // L, tl.program_id(1).to(tl.int64) % L
    row = pid // PARTS
    query, head, real, position = _tile_at(
        row, pid % PARTS, start, stop, positions, lane, batch, position_stride, QUERIES, R, BM
    )
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    q_at = batch * q_strides[0] + query * q_strides[1] + head * q_strides[2]
    at = (batch * t + query) * H + head
    # Kept in the inputs' dtype, in which the products read them: it takes half the registers.
    qt = (_rows(q, q_at, real, keys, K, ACC) * scale).to(q.dtype.element_ty)
    dot_grad = _rows(do, at * V, real, values, V, ACC).to(do.dtype.element_ty)
    norm = tl.load(norms + at, mask=real, other=float("inf"))
    own = tl.load(dots + at, mask=real, other=0.0)
    k += batch * k_strides[0] + (lane * G // L) * k_strides[2]
    v += batch * v_strides[0] + (lane * G // L) * v_strides[2]
    blocks += batch * block_strides[0] + row * block_strides[1] + (lane * F // L) * block_strides[2]
    offset, most = tl.load(first + row), tl.load(count + row)
    last = tl.max(position, 0)
    summed = tl.zeros((BM, BK), ACC)
    for i in range(N):
        block = tl.load(blocks + i)
        wanted = (block >= 0) & (block < most)
        if CAUSAL:
            wanted = wanted & (block * SIZE <= last)
        if wanted:
            begin = tl.load(key_start + offset + block)
            end = tl.load(key_stop + offset + block)
            place = tl.load(key_position + offset + block).to(tl.int32)
            for c in range(0, SIZE, BN):
                n = c + tl.arange(0, BN)
                exists = (n < SIZE) & (begin + n < end)
                kt = _rows(k, (begin + n) * k_strides[1], exists, keys, K, ACC)
                vt = _rows(v, (begin + n) * v_strides[1], exists, values, V, ACC)
                scores = _hide(dot(qt, tl.trans(kt), MODE), real, position, place + n, exists, CAUSAL)
                weights = tl.exp(scores - norm[:, None])
                grads = weights * (dot(dot_grad, tl.trans(vt), MODE) - own[:, None])
                summed += dot(grads, kt, MODE)
    inside = real[:, None] & (keys < K)[None, :]
    tl.store(dq + at[:, None] * K + keys[None, :], (summed * scale).to(dq.dtype.element_ty), mask=inside)


@tuned([{"num_warps": 4, "num_stages": 2}], key=["K", "V", "BM", "BN"])
@triton.jit
def _key_kernel(
    q, k, v, do, naming, bounds, norms, dots, dk, dv, start, stop, key_start, key_stop, key_position, positions,
    q_strides, k_strides, v_strides, list_stride, position_stride, t, s, H, L, F, G, K, V, units, scale,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, CAUSAL: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v for a part of a block, from one lane. Program: block and part; batch entry and lane."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    PIECES: tl.constexpr = (SIZE + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    batch, lane = tl.program_id(1).to(tl.int64) // L, tl.program_id(1).to(tl.int64) % L
    block = pid // PIECES
    n = (pid % PIECES) * BN + tl.arange(0, BN)
    begin = tl.load(key_start + block)
    exists = (n < SIZE) & (begin + n < tl.load(key_stop + block))
    place = tl.load(key_position + block).to(tl.int32) + n
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    k += batch * k_strides[0] + (lane * G // L) * k_strides[2]
    v += batch * v_strides[0] + (lane * G // L) * v_strides[2]
    kt = _rows(k, (begin + n) * k_strides[1], exists, keys, K, ACC)
    vt = _rows(v, (begin + n) * v_strides[1], exists, values, V, ACC)
    dkt, dvt = tl.zeros((BN, BK), ACC), tl.zeros((BN, BV), ACC)
    unit = batch * list_stride + (lane * F // L) * units + block
    for i in range(tl.load(bounds + unit), tl.load(bounds + unit + 1)):
        row = tl.load(naming + i)
        for part in range(PARTS):
            query, head, real, position = _tile_at(
                row, part, start, stop, positions, lane, batch, position_stride, QUERIES, R, BM
            )
            q_at = batch * q_strides[0] + query * q_strides[1] + head * q_strides[2]
            at = (batch * t + query) * H + head
            qt = _rows(q, q_at, real, keys, K, ACC) * scale
            dot_grad = _rows(do, at * V, real, values, V, ACC)
            norm = tl.load(norms + at, mask=real, other=float("inf"))
            own = tl.load(dots + at, mask=real, other=0.0)
            scores = _hide(dot(qt, tl.trans(kt), MODE), real, position, place, exists, CAUSAL)
            weights = tl.exp(scores - norm[:, None])
            dvt += dot(tl.trans(weights), dot_grad, MODE)
            grads = weights * (dot(dot_grad, tl.trans(vt), MODE) - own[:, None])
            dkt += dot(tl.trans(grads), qt, MODE)
    at = (batch * s + begin + n) * L + lane
    tl.store(dk + at[:, None] * K + keys[None, :], dkt, mask=exists[:, None] & (keys < K)[None, :])
    tl.store(dv + at[:, None] * V + values[None, :], dvt, mask=exists[:, None] & (values < V)[None, :])


def _largest(dtype: torch.dtype, width: int) -> int:
    # Of wide tiles, and of those whose products are float32 (float16 needs its range), fewer rows fit registers.
    narrow = dtype == torch.bfloat16 or interpreting()
    return (64 if narrow else 32) // (1 if width <= 64 else 2)


class _Call:
    """What the launches of one call share."""

    def __init__(self, q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale):
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.blocks = distinct(blocks).contiguous()
        (self.batch, self.t, heads, width), (s, groups) = q.shape, k.shape[1:3]
        lists, self.lanes = blocks.shape[2], max(blocks.shape[2], groups)
        self.dtype = accumulate_dtype(v.dtype)
        rows = _largest(v.dtype, max(width, v.shape[3]))
        # Lanes of more heads than a tile has rows are cut.
        while heads // self.lanes > rows:
            self.lanes *= next(n for n in range(2, heads + 1) if heads // self.lanes % n == 0)
        together = heads // self.lanes
        queries = min(query_block, max(1, rows // together))
        self.parts = -(-query_block // queries)
        self.tables = tables(self.t, s, blocks.shape[1], block_size, query_block, cu_seqlens, q_positions, q.device)
        self.positions = self.tables.positions.contiguous()
        self.common = {
            "q_strides": self.q.stride()[:3], "k_strides": self.k.stride()[:3], "v_strides": self.v.stride()[:3],
            "position_stride": 0 if self.positions.shape[0] == 1 else self.t, "t": self.t, "H": heads,
            "L": self.lanes, "F": lists, "G": groups, "K": width, "V": v.shape[3], "scale": scale, "SIZE": block_size,
            "QUERIES": queries, "PARTS": self.parts, "R": together, "CAUSAL": causal,
            "MODE": dot_mode(torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype), wide=True),
            "BM": tile(queries * together), "BN": tile(block_size, rows), "BK": tile(width, 256),
            "BV": tile(v.shape[3], 256),
        }  # fmt: skip

    def of_queries(self) -> dict[str, object]:
        tab = self.tables
        return self.common | {
            "blocks": self.blocks, "start": tab.start, "stop": tab.stop, "first": tab.first, "count": tab.count,
            "key_start": tab.key_start, "key_stop": tab.key_stop, "key_position": tab.key_position,
            "positions": self.positions, "N": self.blocks.shape[3],
            "block_strides": (0 if self.blocks.shape[0] == 1 else self.blocks.stride(0), *self.blocks.stride()[1:3]),
        }  # fmt: skip

    def query_grid(self) -> tuple[int, ...]:
        return grid(self.blocks.shape[1] * self.parts, self.batch * self.lanes)

    def of_keys(self) -> dict[str, object]:
        """The rows that name each block: `naming`, and in `bounds` where those of a block begin."""
        tab, (batch, rows, lists, n) = self.tables, self.blocks.shape
        units = tab.key_start.shape[0]
        first = torch.arange(batch * lists, device=self.q.device).view(batch, 1, lists, 1) * units
        there = (self.blocks >= 0) & (self.blocks < tab.count[:, None, None])
        unit = torch.where(there, first + self.blocks + tab.first[:, None, None], batch * lists * units)
        unit, order = unit.flatten().sort(stable=True)
        bounds = torch.searchsorted(unit, torch.arange(batch * lists * units + 1, device=unit.device))
        return self.common | {
            "naming": order // (lists * n) % rows, "bounds": bounds, "start": tab.start, "stop": tab.stop,
            "key_start": tab.key_start, "key_stop": tab.key_stop, "key_position": tab.key_position,
            "positions": self.positions, "units": units, "list_stride": 0 if batch == 1 else lists * units,
            "s": self.k.shape[1],
        }  # fmt: skip


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cu_seqlens: Tensor | None, q_positions: Tensor | None,
    block_size: int, query_block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the logarithm of each softmax's denominator, (b, t, h); infinite where nothing is seen."""
    call = _Call(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale)
    out = v.new_empty(*q.shape[:3], v.shape[3])
    norms = q.new_empty(q.shape[:3], dtype=call.dtype)
    with on_device_of(v):
        _forward_kernel[call.query_grid()](call.q, call.k, call.v, out=out, norms=norms, **call.of_queries())
    return out, norms


def _launch_backward(
    do: Tensor, out: Tensor, norms: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cu_seqlens: Tensor | None,
    q_positions: Tensor | None, block_size: int, query_block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale)
    do = do.contiguous()
    dots = (do.to(call.dtype) * out.to(call.dtype)).sum(-1)
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_empty(*x.shape[:2], call.lanes, x.shape[3], dtype=call.dtype) for x in (k, v))
    pieces = -(-block_size // call.common["BN"])
    with on_device_of(v):
        _query_kernel[call.query_grid()](
            call.q, call.k, call.v, do, norms=norms, dots=dots, dq=dq, **call.of_queries()
        )  # fmt: skip
        _key_kernel[grid(call.tables.key_start.shape[0] * pieces, call.batch * call.lanes)](
            call.q, call.k, call.v, do, norms=norms, dots=dots, dk=dk, dv=dv, **call.of_keys()
        )  # fmt: skip
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3).to(y.dtype) for x, y in ((dk, k), (dv, v)))
    return dq, dk, dv


_forward = custom_op("omnimix::block_sparse_triton", _launch_forward)
_backward = custom_op("omnimix::block_sparse_triton_backward", _launch_backward)


@_forward.register_fake
@launches(_launch_forward)
def _(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(v.dtype))


@_backward.register_fake
@launches(_launch_backward)
def _(do, out, norms, q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block_size, ctx.query_block, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, do, dnorms):
    options = (ctx.block_size, ctx.query_block, ctx.causal, ctx.scale)
    gradients = torch.ops.omnimix.block_sparse_triton_backward(do, *ctx.saved_tensors, *options)
    return *gradients, *(None,) * 7


_forward.register_gradients(_differentiate, _save)


def block_sparse_triton(
    *, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, query_block: int, causal: bool, scale: float,
    cu_seqlens: Tensor | None, q_positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `omnimix.kernels.block_sparse`."""
    return torch.ops.omnimix.block_sparse_triton(
        q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale
    )[0]
