"""The grouped product as one matrix product per expert, on slices, with a hand-written backward.

One custom op, because the sizes of the slices are data; the products write into their slices of one output. torch's own
`nn.functional.grouped_mm` does the same on a CPU, at the same speed, but takes no float64, and no widths that are not
multiples of 16 bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import UnsupportedShape
from .ops import backend_of


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


def _rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[2])
    for expert, rows in _slices(counts, x.shape[0]):
        if expert < 0:
            y[rows].zero_()
        else:
            torch.mm(x[rows], weight[expert], out=y[rows])
    return y


def _weights(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    dweight = x.new_empty(counts.shape[0], x.shape[1], dy.shape[1])
    used = set()
    for expert, rows in _slices(counts, x.shape[0]):
        if expert >= 0:
            torch.mm(x[rows].t(), dy[rows], out=dweight[expert])
            used.add(expert)
    for expert in set(range(dweight.shape[0])) - used:
        dweight[expert].zero_()
    return dweight


grouped_mm_chunked = backend_of("chunked", _rows, _weights)
