"""The grouped product as one matrix product per expert, on slices, with a hand-written backward.

One custom op, because the sizes of the slices are data; the products write into their slices of one output. torch's own
`nn.functional.grouped_mm` does the same on a CPU, at the same speed, but takes no float64, and no widths that are not
multiples of 16 bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import UnsupportedShape


def _slices(counts: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with these, and at last the rows that have no expert, as expert -1."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count < 0 or start + count > rows:
            raise UnsupportedShape(f"counts: {counts.tolist()} are not shares of {rows} rows")
        if count:
            yield expert, slice(start, start + count)
        start += count
    if start < rows:
        yield -1, slice(start, rows)


def _multiply(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[2])
    for expert, rows in _slices(counts, x.shape[0]):
        if expert < 0:
            y[rows].zero_()
        else:
            torch.mm(x[rows], weight[expert], out=y[rows])
    return y


@torch.library.custom_op("omnimix::grouped_mm_chunked", mutates_args=())
def _forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _multiply(x, weight, counts)


@_forward.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("omnimix::grouped_mm_chunked_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, into_x: bool, into_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = _multiply(dy, weight.transpose(1, 2), counts) if into_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if into_weight else 0)
    if into_weight:
        used = set()
        for expert, rows in _slices(counts, x.shape[0]):
            if expert >= 0:
                torch.mm(x[rows].t(), dy[rows], out=dweight[expert])
                used.add(expert)
        for expert in set(range(weight.shape[0])) - used:
            dweight[expert].zero_()
    return dx, dweight


@_backward.register_fake
def _(dy, x, weight, counts, into_x, into_weight):
    return x.new_empty(x.shape if into_x else 0), weight.new_empty(weight.shape if into_weight else 0)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    x, weight, counts = ctx.saved_tensors
    into_x, into_weight, _ = ctx.needs_input_grad
    dx, dweight = torch.ops.omnimix.grouped_mm_chunked_backward(dy.contiguous(), x, weight, counts, into_x, into_weight)
    return dx if into_x else None, dweight if into_weight else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def grouped_mm_chunked(*, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `omnimix.kernels.grouped_mm`."""
    return torch.ops.omnimix.grouped_mm_chunked(x, weight, counts)
