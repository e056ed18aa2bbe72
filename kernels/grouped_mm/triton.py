"""Triton kernels of `grouped_mm`.

The rows are cut into tiles that never hold rows of two experts. How many there are is data, but at most n / R + e + 1
for R rows in a tile: that is the grid, and a table made on the device names each tile's expert; the rows without expert
count as one more, which gets zeros. Nothing waits for the counts. The gradient with respect to x is the same kernel on
the transposed weights; each program of the weights' gradient goes over all rows of its expert, so nothing is added
atomically.

Bytes moved and arithmetic intensity, for elements of s bytes and tiles of R rows and C columns:
    `_rows_kernel`: s · n · (d · f / C + d · f / R + f), hence 2 R C / (s (R + C)) operations a byte for large d.
    `_weight_kernel`: s · (n · d · f / C + n · d · f / R + e · d · f), for tiles of R x C of a weight.
Products between neighbouring tiles share their operands in the cache: what reaches the memory is about
s · (n · d + n · f + e · d · f).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import chunk_table, dot_mode, grid, on_device_of, tile, tuned, unit_stride
from ..common.triton_tools import dot
from .ops import backend_of


@tuned([{"num_warps": 8, "num_stages": 3}, {"num_warps": 8, "num_stages": 2}], key=["D", "F"])
@triton.jit
def _rows_kernel(
    x, weight, y, table, bounds, x_stride, w_expert, w_in, w_out, E, D, F,
    BR: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """y = x W of the tile's expert. Program: tile of rows and of columns, columns first."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(F, BF)
    row, column = pid // across, (pid % across) * BF + tl.arange(0, BF)
    expert = tl.load(table + 2 * row).to(tl.int64)
    if expert <= E:
        start = tl.load(bounds + expert).to(tl.int64) + tl.load(table + 2 * row + 1).to(tl.int64) * BR
        r = start + tl.arange(0, BR)
        inside = r < tl.load(bounds + expert + 1).to(tl.int64)
        acc = tl.zeros((BR, BF), ACC)
        # Expert E is none: its rows are zero, and it has no weight to read.
        depth = tl.where(expert < E, D, 0)
        for start_d in range(0, depth, BD):
            d = start_d + tl.arange(0, BD)
            left = tl.load(x + r[:, None] * x_stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            right = tl.load(
                weight + expert * w_expert + d[:, None] * w_in + column[None, :] * w_out,
                mask=(d < D)[:, None] & (column < F)[None, :],
                other=0.0,
            )
            acc += dot(left, right, MODE)
        to = y + r[:, None] * F + column[None, :]
        tl.store(to, acc.to(y.dtype.element_ty), mask=inside[:, None] & (column < F)[None, :])


@tuned([{"num_warps": 8, "num_stages": 3}, {"num_warps": 8, "num_stages": 2}], key=["D", "F"])
@triton.jit
def _weight_kernel(
    x, dy, dweight, bounds, x_stride, dy_stride, D, F,
    BR: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dW = xᵀ dy over the rows of an expert. Program: expert, and tile of its weight."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    across, down = tl.cdiv(F, BF), tl.cdiv(D, BD)
    expert, part = pid // (across * down), pid % (across * down)
    d = (part // across) * BD + tl.arange(0, BD)
    column = (part % across) * BF + tl.arange(0, BF)
    start = tl.load(bounds + expert).to(tl.int64)
    end = tl.load(bounds + expert + 1).to(tl.int64)
    acc = tl.zeros((BD, BF), ACC)
    for first in range(start, end, BR):
        r = first + tl.arange(0, BR)
        left = tl.load(x + r[:, None] * x_stride + d[None, :], mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(
            dy + r[:, None] * dy_stride + column[None, :], mask=(r < end)[:, None] & (column < F)[None, :], other=0.0
        )
        acc += dot(tl.trans(left), right, MODE)
    to = dweight + (expert * D + d[:, None]) * F + column[None, :]
    tl.store(to, acc.to(dweight.dtype.element_ty), mask=(d < D)[:, None] & (column < F)[None, :])


def _bounds(counts: Tensor, rows: int) -> Tensor:
    """0, the experts' last rows, and the last row of all: (e + 2,)."""
    # Counts that add up to more than there is must not lead out of the tensors.
    ends = F.pad(counts.cumsum(0, dtype=torch.int64).clamp(0, rows), (1, 1))
    ends[-1] = rows
    return ends


def _tiles(dtype: torch.dtype) -> tuple[int, int]:
    """The largest tile of an output, and of what is summed over: half of it in float32, which takes three products."""
    return (128, 32) if dtype.itemsize == 2 else (64, 32)


def _launch_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    x = unit_stride(x)
    (rows, d), (experts, _, f) = x.shape, weight.shape
    y = x.new_empty(rows, f)
    largest, depth = _tiles(x.dtype)
    # As many rows as an expert has on average: a smaller tile wastes less of what is padded.
    block = tile(max(1, rows // experts), largest)
    bounds = _bounds(counts, rows)
    table, _ = chunk_table(bounds, block, rows)
    columns = tile(f, largest)
    with on_device_of(x):
        _rows_kernel[grid(table.shape[0] * triton.cdiv(f, columns))](
            x, weight, y, table, bounds, x.stride(0), *weight.stride(), experts, d, f,
            BR=block, BF=columns, BD=tile(d, depth), MODE=dot_mode(x.dtype),
        )  # fmt: skip
    return y


def _launch_weights(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    x, dy = unit_stride(x), unit_stride(dy)
    experts, d, f = counts.shape[0], x.shape[1], dy.shape[1]
    dweight = x.new_empty(experts, d, f)
    largest, depth = _tiles(x.dtype)
    down, across = tile(d, largest), tile(f, largest)
    with on_device_of(x):
        _weight_kernel[grid(experts * triton.cdiv(d, down) * triton.cdiv(f, across))](
            x, dy, dweight, _bounds(counts, x.shape[0]), x.stride(0), dy.stride(0), d, f,
            BR=depth, BF=across, BD=down, MODE=dot_mode(x.dtype),
        )  # fmt: skip
    return dweight


grouped_mm_triton = backend_of("triton", _launch_rows, _launch_weights)
