"""`linear_recurrence` in plain torch, on any device: one `addcmul` a step, on rows that stay in the cache.

There is no division and no logarithm of `a`, so factors of zero and of any sign or phase are exact. Time is cut into
chunks only to bound what is converted to another precision, or conjugated, at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import gradient_shapes, register, shapes, wide_dtype

CHUNK = 64


@dataclass
class _Segment:
    """The rows of the batch, or one packed sequence."""

    rows: slice
    sequences: slice
    start: int
    stop: int

    def chunks(self, backwards: bool) -> list[slice]:
        """The chunks in the order in which they are run through."""
        cut = [slice(p, min(p + CHUNK, self.stop)) for p in range(self.start, self.stop, CHUNK)]
        return cut[::-1] if backwards else cut

    def rows_of(self, x: Tensor, steps: slice, dtype: torch.dtype) -> Tensor:
        """A sequence's chunk; the one row of a constant factor."""
        return x.to(dtype) if x.dim() == 1 else x[self.rows, steps].to(dtype)


def _segments(batch: int, length: int, cu_seqlens: Tensor | None) -> Iterator[_Segment]:
    if cu_seqlens is None:
        yield _Segment(slice(0, batch), slice(0, batch), 0, length)
        return
    edges = cu_seqlens.tolist()
    for i in range(len(edges) - 1):
        yield _Segment(slice(0, 1), slice(i, i + 1), edges[i], edges[i + 1])


def _per_step(a: Tensor, count: int) -> Sequence[Tensor]:
    return [a] * count if a.dim() == 1 else a.unbind(1)


def _forward(x, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor]:
    h, final = shapes(x, a, initial_state, cu_seqlens, reverse)
    wide = final.dtype
    for segment in _segments(x.shape[0], x.shape[1], cu_seqlens):
        state = final[segment.sequences]
        if initial_state is None:
            state.zero_()
        else:
            state.copy_(initial_state[segment.sequences])
        last = state
        for steps in segment.chunks(reverse):
            inputs = segment.rows_of(x, steps, wide)
            own = h[segment.rows, steps]
            outputs = own if h.dtype == wide else torch.empty_like(inputs)
            rows = zip(
                inputs.unbind(1),
                _per_step(segment.rows_of(a, steps, wide), inputs.shape[1]),
                outputs.unbind(1),
                strict=True,
            )
            for value, factor, row in reversed(list(rows)) if reverse else rows:
                last = torch.addcmul(value, factor, last, out=row)
            if outputs is not own:
                own.copy_(outputs)
        state.copy_(last)
    return h, final


def _before(segment: _Segment, h: Tensor, steps: slice, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """The states from which the steps of a chunk continued."""
    wide = wide_dtype(h.dtype)
    edge = steps.stop if reverse else steps.start - 1
    if segment.start <= edge < segment.stop:
        outer = h[segment.rows, edge]
    elif initial_state is not None:
        outer = initial_state[segment.sequences]
    else:
        outer = torch.zeros_like(h[segment.rows, 0])
    outer = outer.to(wide).unsqueeze(1)
    if reverse:
        return torch.cat([h[segment.rows, steps.start + 1 : steps.stop].to(wide), outer], dim=1)
    return torch.cat([outer, h[segment.rows, steps.start : steps.stop - 1].to(wide)], dim=1)


def _backward(dh, dfinal, h, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, dstate = gradient_shapes(dh, dfinal, h, a, initial_state, cu_seqlens, reverse)
    wide = dfinal.dtype
    constant = a.dim() == 1
    total = torch.zeros_like(a, dtype=wide) if constant else da
    for segment in _segments(h.shape[0], h.shape[1], cu_seqlens):
        # The gradient of the state after the step at hand, from what follows.
        carry = dfinal[segment.sequences]
        for steps in segment.chunks(not reverse):
            grown = segment.rows_of(dh, steps, wide).clone()
            factors = _per_step(segment.rows_of(a, steps, wide).conj_physical(), grown.shape[1])
            rows = list(zip(grown.unbind(1), factors, strict=True))
            last: Any = None
            factor: Any = None
            for row, own in rows if reverse else reversed(rows):
                if factor is None:
                    row += carry
                else:
                    row.addcmul_(factor, last)
                last, factor = row, own
            carry = last * factor
            dx[segment.rows, steps] = grown
            # Not a conjugated view, which torch's tracing of custom ops misreads.
            through = grown * _before(segment, h, steps, initial_state, reverse).conj_physical()
            if constant:
                total += through.sum((0, 1))
            else:
                da[segment.rows, steps] = through
        if initial_state is not None:
            dstate[segment.sequences] = carry
    return dx, total.to(a.dtype) if constant else da, dstate


_scan = register("chunked", _forward, _backward)


def linear_recurrence_chunked(
    *, x: Tensor, a: Tensor, reverse: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.linear_recurrence`."""
    if x.shape[1] != 1 or cu_seqlens is not None:
        return _scan(x=x, a=a, reverse=reverse, initial_state=initial_state, cu_seqlens=cu_seqlens)
    # A single step is one sum, which autograd and torch.compile go through.
    wide = wide_dtype(x.dtype)
    state = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if initial_state is None else initial_state.to(wide)
    h = torch.addcmul(x[:, 0].to(wide), (a if a.dim() == 1 else a[:, 0]).to(wide), state)
    return h.to(x.dtype).unsqueeze(1), h
