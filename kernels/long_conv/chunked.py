"""The long convolution: which sum is taken for which sizes, and the custom ops around them.

Products of FFTs (`transform`) serve long filters on long sequences. Few taps, or few steps, are summed directly
(`direct`): that is quicker, and to the bit causal, while an FFT spreads its rounding errors over its window. Of the
forward pass only the inputs are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..custom import custom_op
from .direct import by_lag, by_lag_backward, by_step, by_step_backward
from .transform import by_transform, by_transform_backward, transposed

# Taps, or steps, up to which sums are taken directly.
DIRECT = 32


def long_conv_chunked(
    *,
    u: Tensor,
    filters: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.long_conv`."""
    return _forward(u, filters, skip, initial_state, cu_seqlens)


@dataclass
class _Segment:
    """Rows of the batch, or one packed sequence: its inputs, its state, and the taps that reach any of them."""

    u: Tensor
    state: Tensor | None
    filters: Tensor
    steps: slice
    states: slice

    def convolve(self) -> Tensor:
        """Σ_j filters[:, j] u_{t-j} in the working dtype, (b, t, d)."""
        taps, t = self.filters.shape[1], self.u.shape[1]
        way: Any = by_lag if taps <= DIRECT else by_step if t <= DIRECT else by_transform
        return way(self.u, self.state, self.filters)

    def convolve_backward(self, g: Tensor) -> tuple[Tensor, Any, Tensor]:
        """The gradients of u, the state and the filters; the state's means nothing where there is none."""
        taps, t = self.filters.shape[1], self.u.shape[1]
        way: Any = by_lag_backward if taps <= DIRECT else by_step_backward if t <= DIRECT else by_transform_backward
        return way(g, self.u, self.state, self.filters)


def _segments(u: Tensor, filters: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[_Segment]:
    b, t, _ = u.shape
    edges = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    compute = torch.promote_types(u.dtype, torch.float32)
    wide = filters.to(compute)
    for i, (start, end) in enumerate(pairwise(edges)):
        if start == end:
            continue
        states = slice(0, b) if cu_seqlens is None else slice(i, i + 1)
        own = None if state is None else state[states]
        taps = wide if state is not None else wide[:, : end - start]
        yield _Segment(u[:, start:end], own, taps, slice(start, end), states)


@custom_op("omnimix::long_conv_chunked")
def _forward(
    u: Tensor, filters: Tensor, skip: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, final = _shapes(u, filters, skip, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        # The states of empty sequences stay what they are.
        final.zero_() if initial_state is None else final.copy_(initial_state)
    outputs = []
    for segment in _segments(u, filters, initial_state, cu_seqlens):
        y = segment.convolve()
        if skip is not None:
            y.addcmul_(segment.u.to(y.dtype), skip.to(y.dtype))
        outputs.append(y.to(u.dtype))
        _keep(segment, final[segment.states])
    return outputs[0] if cu_seqlens is None else torch.cat(outputs, dim=1), final


@_forward.register_fake
def _shapes(u, filters, skip, initial_state, cu_seqlens):
    n = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(n, u.shape[2], filters.shape[1] - 1)


def _keep(segment: _Segment, final: Tensor) -> None:
    """The last inputs into `final`."""
    t, past = segment.u.shape[1], final.shape[2]
    if t < past:
        final[:, :, : past - t] = 0 if segment.state is None else segment.state[:, :, t:]
    kept = min(t, past)
    final[:, :, past - kept :] = transposed(segment.u[:, t - kept :])


@custom_op("omnimix::long_conv_chunked_backward")
def _backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    filters: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, dskip, dstate = _gradient_shapes(dy, dfinal, u, filters, skip, initial_state, cu_seqlens)
    if cu_seqlens is not None and initial_state is not None:
        dstate.copy_(dfinal)
    compute = torch.promote_types(u.dtype, torch.float32)
    dfilters = torch.zeros_like(filters, dtype=compute, memory_format=torch.contiguous_format)
    weight = torch.zeros_like(dskip, dtype=compute)
    inputs = []
    for segment in _segments(u, filters, initial_state, cu_seqlens):
        g, of_final, t = dy[:, segment.steps].to(compute), dfinal[segment.states], segment.u.shape[1]
        du, before, taps = segment.convolve_backward(g)
        dfilters[:, : taps.shape[1]] += taps
        if skip is not None:
            du.addcmul_(g, skip.to(compute))
            weight += (g * segment.u.to(compute)).sum((0, 1))
        # What was read last is the final state too.
        past = of_final.shape[2]
        kept = min(past, t)
        du[:, t - kept :] += transposed(of_final[:, :, past - kept :])
        inputs.append(du.to(u.dtype))
        if segment.state is not None:
            before[:, :, min(t, past) :] += of_final[:, :, : past - kept]
            dstate[segment.states] = before
    dskip.copy_(weight)
    du = inputs[0] if cu_seqlens is None else torch.cat(inputs, dim=1)
    return du.contiguous(), dfilters.to(filters.dtype), dskip, dstate


@_backward.register_fake
def _gradient_shapes(dy, dfinal, u, filters, skip, initial_state, cu_seqlens):
    dskip = u.new_empty(0) if skip is None else skip.new_empty(skip.shape)
    dstate = u.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return u.new_empty(u.shape), filters.new_empty(filters.shape), dskip, dstate


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy, dfinal):
    u, filters, skip, initial_state, cu_seqlens = ctx.saved_tensors
    du, dfilters, dskip, dstate = _backward(
        dy.contiguous(), dfinal.contiguous(), u, filters, skip, initial_state, cu_seqlens
    )
    return du, dfilters, None if skip is None else dskip, None if initial_state is None else dstate, None


_forward.register_gradients(_differentiate, _save)
