"""The causal depthwise convolution as w multiply-adds of shifted inputs, in blocks of time that stay in the cache.

A block of n steps is computed from n + w - 1 rows of input, of which the first w - 1 belong to the block before it or
to the state. The backward pass goes from the last block to the first and carries the gradient of these rows along: it
starts as the gradient of the final state and ends as that of the initial one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Gradients, Outputs, gradient_shapes, register, shapes

# Elements of a block: 512 KiB of float32, so that a block's inputs, outputs and scratch stay in the cache.
BLOCK = 2**17


def short_conv_chunked(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.short_conv`."""
    if x.shape[1] == 1 and cu_seqlens is None:
        return _one_step(x, weight, bias, activation, initial_state)
    return _convolved(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


def _one_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A single step is one product of the window with the filters."""
    compute = torch.promote_types(x.dtype, torch.float32)
    last = x.transpose(1, 2)
    before = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1) if state is None else state.to(x.dtype)
    window = torch.cat([before, last], dim=2)
    y = (window.to(compute) * weight.to(compute)).sum(2)
    y = y if bias is None else y + bias.to(compute)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype)[:, None], window[:, :, 1:]


@dataclass
class _Segment:
    """Rows of the batch, or one packed sequence, that are computed together."""

    x: Tensor
    state: Tensor | None
    rows: slice
    steps: slice
    states: slice
    history: int
    compute: torch.dtype

    def blocks(self) -> list[tuple[int, int]]:
        b, t, d = self.x.shape
        # An accelerator has no use for small blocks.
        size = max(BLOCK // (b * d), 16, self.history) if self.x.device.type == "cpu" else t
        return [(a, min(a + size, t)) for a in range(0, t, size)]

    def wide(self, a: int, e: int) -> Tensor:
        """The inputs of steps a … e-1 and the `history` rows before them."""
        if a >= self.history:
            return self.x[:, a - self.history : e].to(self.compute)
        b, _, d = self.x.shape
        if self.state is None:
            before = self.x.new_zeros(b, self.history, d)
        else:
            before = self.state.to(self.x.dtype).transpose(1, 2)
        return torch.cat([before[:, a:], self.x[:, :e]], dim=1).to(self.compute)


def _segments(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, history: int) -> Iterator[_Segment]:
    b, t, d = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    if cu_seqlens is None:
        size = max(1, BLOCK // (t * d)) if x.device.type == "cpu" else b
        spans = [(slice(i, min(i + size, b)), slice(0, t), slice(i, min(i + size, b))) for i in range(0, b, size)]
    else:
        edges = cu_seqlens.tolist()
        # Empty sequences have no inputs to compute on.
        spans = [(slice(0, 1), slice(a, e), slice(i, i + 1)) for i, (a, e) in enumerate(pairwise(edges)) if a < e]
    for rows, steps, states in spans:
        own = None if state is None else state[states]
        yield _Segment(x[rows, steps], own, rows, steps, states, history, compute)


def _convolve(wide: Tensor, taps: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> Tensor:
    n, width = out.shape[1], len(taps)
    if bias is None:
        torch.mul(wide[:, width - 1 :], taps[-1], out=out)
    else:
        torch.addcmul(bias, wide[:, width - 1 :], taps[-1], out=out)
    for j in range(width - 1):
        out.addcmul_(wide[:, j : j + n], taps[j])
    return out


def _scratch(segment: _Segment, blocks: list[tuple[int, int]], extra: int = 0) -> Tensor:
    b, _, d = segment.x.shape
    return segment.x.new_empty(b, blocks[0][1] + extra, d, dtype=segment.compute)


def _forward(x, weight, bias, initial_state, cu_seqlens, silu) -> Outputs:
    y, final = shapes(x, weight, bias, initial_state, cu_seqlens, silu)
    if cu_seqlens is not None:
        # The states of empty sequences stay what they are.
        final.zero_() if initial_state is None else final.copy_(initial_state)
    history = weight.shape[1] - 1
    for segment in _segments(x, initial_state, cu_seqlens, history):
        taps, base = _parameters(weight, bias, segment.compute)
        blocks = segment.blocks()
        own = y[segment.rows, segment.steps]
        scratch = None if y.dtype == segment.compute else _scratch(segment, blocks)
        for a, e in blocks:
            wide = segment.wide(a, e)
            z = _convolve(wide, taps, base, own[:, a:e] if scratch is None else scratch[:, : e - a])
            if silu:
                F.silu(z, inplace=True)
            if scratch is not None:
                own[:, a:e] = z
        final[segment.states] = wide[:, wide.shape[1] - history :].transpose(1, 2)
    return y, final


def _parameters(weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> tuple[Sequence[Tensor], Tensor | None]:
    """One vector for each lag, longest first, and the bias."""
    return weight.to(compute).t().contiguous().unbind(), None if bias is None else bias.to(compute)


def _backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu) -> Gradients:
    dx, _, _, dstate = gradient_shapes(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)
    if cu_seqlens is not None:
        dstate.copy_(dfinal)
    width = weight.shape[1]
    history = width - 1
    compute = torch.promote_types(x.dtype, torch.float32)
    taps, base = _parameters(weight, bias, compute)
    dtaps, dbias = [torch.zeros_like(tap) for tap in taps], torch.zeros_like(taps[0])
    for segment in _segments(x, initial_state, cu_seqlens, history):
        blocks = segment.blocks()
        zs, dwides, products = _scratch(segment, blocks), _scratch(segment, blocks, history), _scratch(segment, blocks)
        own_dy, own_dx = dy[segment.rows, segment.steps], dx[segment.rows, segment.steps]
        carry = dfinal[segment.states].to(compute).transpose(1, 2)
        for a, e in reversed(blocks):
            n = e - a
            wide, dz = segment.wide(a, e), own_dy[:, a:e].to(compute)
            if silu:
                z = _convolve(wide, taps, base, zs[:, :n])
                dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=products[:, :n])
            dbias += dz.sum((0, 1))
            dwide = dwides[:, : n + history].zero_()
            dwide[:, n:] += carry
            for j in range(width):
                dwide[:, j : j + n].addcmul_(dz, taps[j])
                dtaps[j] += torch.mul(dz, wide[:, j : j + n], out=zs[:, :n]).sum((0, 1))
            own_dx[:, a:e] = dwide[:, history:]
            carry = dwide[:, :history].clone()
        dstate[segment.states] = carry.transpose(1, 2)
    return (
        dx,
        torch.stack(dtaps, dim=1).to(weight.dtype),
        dbias.to(weight.dtype if bias is None else bias.dtype),
        dstate,
    )


_convolved = register("chunked", _forward, _backward)
