"""`selective_scan` in plain torch, on any device: a loop over the steps inside blocks that stay in the cache.

A block is some rows of the batch, some channels of one group, and `CHUNK` steps, laid out (step, row, n, channel). What
has no recurrence (decays, inputs, the sum over states) is done for all steps of a block at once; the recurrence is one
`addcmul` a step. Autograd would keep every state and every decay; the backward pass here starts from the states at the
chunks' starts, computes those within a chunk again, and runs back through it, again with one `addcmul` a step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.tools import accumulate_dtype
from .ops import Gradients, Outputs, by_name, gradient_shapes, register, shapes

# Steps in a block and between saved states.
CHUNK = 32
# States in a step of a block: with fewer the calls take longer than the arithmetic, with more a block leaves the cache.
STATES = 2**14


@dataclass
class _Block:
    """Rows of equal length and channels of one group, which are computed together."""

    rows: slice
    steps: slice
    sequences: slice
    channels: slice
    group: int
    first_chunk: int
    chunks_per_row: int

    def chunks(self) -> list[tuple[int, slice]]:
        starts = range(self.steps.start, self.steps.stop, CHUNK)
        return [(i, slice(a, min(a + CHUNK, self.steps.stop))) for i, a in enumerate(starts)]

    def border(self, borders: Tensor, chunk: int) -> Tensor:
        """The saved states (row, n, channel) at the start of a chunk."""
        count = self.sequences.stop - self.sequences.start
        first = self.first_chunk + chunk
        return borders[first : first + (count - 1) * self.chunks_per_row + 1 : self.chunks_per_row, :, self.channels]


def _blocks(x: Tensor, n: int, groups: int, cu_seqlens: Tensor | None) -> Iterator[_Block]:
    b, t, d = x.shape
    # An accelerator has no use for small blocks.
    channels = min(d // groups, max(16, STATES // n)) if x.device.type == "cpu" else d // groups
    rows = max(1, STATES // (n * channels)) if x.device.type == "cpu" else b
    per_row = (t + CHUNK - 1) // CHUNK
    spans = []
    if cu_seqlens is None:
        for r in range(0, b, rows):
            some = slice(r, min(r + rows, b))
            spans.append((some, slice(0, t), some, r * per_row))
    else:
        edges = cu_seqlens.tolist()
        for i in range(len(edges) - 1):
            spans.append((slice(0, 1), slice(edges[i], edges[i + 1]), slice(i, i + 1), edges[i] // CHUNK + i))
    width = d // groups
    for some, steps, sequences, first in spans:
        for group in range(groups):
            for c in range(0, width, channels):
                own = slice(group * width + c, group * width + min(c + channels, width))
                yield _Block(some, steps, sequences, own, group, first, per_row)


class _Inputs:
    """The arguments of a call and its scratch memory, seen block by block in the dtype of the states."""

    def __init__(self, x, delta, A, B, C, D, z, bias, initial_state, softplus):
        self.wide = accumulate_dtype(x.dtype)
        self.x, self.delta, self.B, self.C, self.z, self.softplus = x, delta, B, C, z, softplus
        # In powers of 2, which torch computes several times as fast on CPUs as those of e.
        self.A = A.to(self.wide).t().contiguous() * math.log2(math.e)
        self.D: Any = None if D is None else D.to(self.wide)
        self.bias: Any = None if bias is None else bias.to(self.wide)
        self.initial_state = initial_state
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, *shape: int) -> Tensor:
        size = 1
        for s in shape:
            size *= s
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = self.x.new_empty(size, dtype=self.wide)
        return held[:size].view(shape)

    def cut(self, sequence: Tensor, block: _Block, steps: slice) -> Tensor:
        """(step, row, channel), contiguous."""
        return sequence[block.rows, steps, block.channels].to(self.wide).transpose(0, 1).contiguous()

    def weights(self, sequence: Tensor, block: _Block, steps: slice) -> Tensor:
        """(step, row, n), contiguous."""
        return sequence[block.rows, steps, block.group].to(self.wide).transpose(0, 1).contiguous()

    def raw_steps(self, block: _Block, steps: slice) -> Tensor:
        raw = self.cut(self.delta, block, steps)
        return raw if self.bias is None else raw + self.bias[block.channels]

    def state(self, block: _Block) -> Tensor:
        """(row, n, channel), a copy."""
        rows = block.sequences.stop - block.sequences.start
        if self.initial_state is None:
            return self.A.new_zeros(rows, self.A.shape[0], block.channels.stop - block.channels.start)
        own = self.initial_state[block.sequences, block.channels].to(self.wide)
        return own.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def advance(self, block: _Block, steps: slice, x: Tensor, step: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states (step, row, n, channel) after each step."""
        into, size = self.weights(self.B, block, steps), (*x.shape[:2], self.A.shape[0], x.shape[2])
        decays, states = self.scratch("decays", *size), self.scratch("states", *size)
        torch.mul(step.unsqueeze(2), self.A[:, block.channels], out=decays).exp2_()
        torch.mul((step * x).unsqueeze(2), into.unsqueeze(3), out=states)
        for h, a in zip(states.unbind(), decays.unbind(), strict=True):
            state = torch.addcmul(h, a, state, out=h)
        return decays, states


def _softplus(x: Tensor) -> Tensor:
    """log(e^x + 1), which torch computes four times as fast on CPUs as under its own name."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _read(weights: Tensor, states: Tensor) -> Tensor:
    """Σ_n weights[..., n] states[..., n, :], one product for each step and row."""
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1)).view(*weights.shape[:2], -1)


def _project(states: Tensor, row: Tensor) -> Tensor:
    """Σ_c states[..., c] row[..., 0, c]: a row times a matrix, ten times as quick as the matrix times a column."""
    product = torch.bmm(row.flatten(0, 1).unsqueeze(1), states.flatten(0, 1).transpose(1, 2))
    return product.view(*row.shape[:2], -1)


def _forward(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus) -> Outputs:
    y, final, borders = shapes(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus, CHUNK)
    inputs = _Inputs(x, delta, A, B, C, D, z, bias, initial_state, softplus)
    for block in _blocks(x, A.shape[1], B.shape[2], cu_seqlens):
        state = inputs.state(block)
        for number, steps in block.chunks():
            block.border(borders, number).copy_(state)
            own, step = inputs.cut(x, block, steps), inputs.raw_steps(block, steps)
            step = _softplus(step) if softplus else step
            _, states = inputs.advance(block, steps, own, step, state)
            out = _read(inputs.weights(C, block, steps), states)
            if D is not None:
                out.addcmul_(own, inputs.D[block.channels])
            if z is not None:
                out *= F.silu(inputs.cut(z, block, steps))
            y[block.rows, steps, block.channels] = out.transpose(0, 1)
            state.copy_(states[-1])
        final[block.sequences, block.channels] = state.transpose(1, 2)
    return y, final, borders


class _Gradients:
    """What the blocks' gradients are summed into, in the dtype of the states."""

    def __init__(self, inputs: _Inputs, B: Tensor):
        n, d = inputs.A.shape
        self.A, self.D, self.bias = inputs.A.new_zeros(n, d), inputs.A.new_zeros(d), inputs.A.new_zeros(d)
        self.x, self.delta = (torch.empty(inputs.x.shape, dtype=inputs.wide, device=B.device) for _ in range(2))
        self.B, self.C = (torch.zeros(B.shape, dtype=inputs.wide, device=B.device) for _ in range(2))
        # Where there is a gate.
        self.z: Any = None if inputs.z is None else torch.empty_like(self.x)


def _ungate(inputs: _Inputs, block: _Block, steps: slice, dy: Tensor, y: Tensor, sums: _Gradients) -> Tensor:
    """The gradient of what the gate multiplies; y is that value."""
    z = inputs.cut(inputs.z, block, steps)
    dz = torch.ops.aten.silu_backward(dy * y, z)
    sums.z[block.rows, steps, block.channels] = dz.transpose(0, 1)
    return dy * F.silu(z)


def _retreat(
    inputs: _Inputs, block: _Block, steps: slice, before: Tensor, dy: Tensor, g: Tensor, sums: _Gradients
) -> Tensor:
    """One chunk back in time.

    Args:
        before: the state at the chunk's start.
        dy: (step, row, channel).
        g: the gradient of the state after the chunk, (row, n, channel).

    Returns:
        The gradient of the state before the chunk.
    """
    own, raw = inputs.cut(inputs.x, block, steps), inputs.raw_steps(block, steps)
    step = _softplus(raw) if inputs.softplus else raw
    decays, states = inputs.advance(block, steps, own, step, before)
    into, out = inputs.weights(inputs.B, block, steps), inputs.weights(inputs.C, block, steps)
    if inputs.z is not None:
        y = _read(out, states)
        y = y if inputs.D is None else y.addcmul_(own, inputs.D[block.channels])
        dy = _ungate(inputs, block, steps, dy, y, sums)
    sums.C[block.rows, steps, block.group] += _project(states, dy).transpose(0, 1)
    # The gradients of the states after each step; those that go through the decay of the next step come last.
    grown = torch.mul(out.unsqueeze(3), dy.unsqueeze(2), out=inputs.scratch("gradients", *states.shape))
    rows, factors = grown.unbind(), decays.unbind()
    rows[-1].add_(g)
    for i in range(len(rows) - 2, -1, -1):
        torch.addcmul(rows[i], factors[i + 1], rows[i + 1], out=rows[i])
    sums.B[block.rows, steps, block.group] += _project(grown, step * own).transpose(0, 1)
    du = _read(into, grown)
    g = torch.mul(rows[0], factors[0])
    # Through the decays: first the gradient of Δ A.
    through = decays.mul_(grown)
    through[0].mul_(before)
    through[1:].mul_(states[:-1])
    sums.A[:, block.channels] += torch.mul(through, step.unsqueeze(2), out=grown).sum((0, 1))
    dstep = through.mul_(inputs.A[:, block.channels]).sum(2).mul_(math.log(2)).addcmul_(du, own)
    dx = du.mul_(step)
    if inputs.D is not None:
        dx.addcmul_(dy, inputs.D[block.channels])
        sums.D[block.channels] += (dy * own).sum((0, 1))
    if inputs.softplus:
        dstep *= raw.sigmoid()
    sums.bias[block.channels] += dstep.sum((0, 1))
    sums.x[block.rows, steps, block.channels] = dx.transpose(0, 1)
    sums.delta[block.rows, steps, block.channels] = dstep.transpose(0, 1)
    return g


def _backward(dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus) -> Gradients:
    inputs = _Inputs(x, delta, A, B, C, D, z, bias, initial_state, softplus)
    sums = _Gradients(inputs, B)
    dstate = torch.empty_like(dfinal)
    for block in _blocks(x, A.shape[1], B.shape[2], cu_seqlens):
        g = dfinal[block.sequences, block.channels].transpose(1, 2)
        for number, steps in reversed(block.chunks()):
            before = block.border(borders, number)
            g = _retreat(inputs, block, steps, before, inputs.cut(dy, block, steps), g, sums)
        dstate[block.sequences, block.channels] = g.transpose(1, 2)
    found = (sums.x, sums.delta, sums.A.t(), sums.B, sums.C, sums.D, sums.z, sums.bias, dstate)
    empty = gradient_shapes(dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state)
    gradients: Any = (
        e if a is None else f.to(a.dtype).contiguous()
        for f, a, e in zip(found, (x, delta, A, B, C, D, z, bias, initial_state), empty, strict=True)
    )
    return tuple(gradients)


_scan = by_name(register("chunked", CHUNK, _forward, _backward))


def selective_scan_chunked(*, x: Tensor, cu_seqlens: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.selective_scan`."""
    if x.shape[1] == 1 and cu_seqlens is None:
        return _one_step(x=x, **arguments)
    return _scan(x=x, cu_seqlens=cu_seqlens, **arguments)


def _one_step(*, x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state) -> tuple[Tensor, Tensor]:
    """A single step needs no blocks: plain torch, which autograd and torch.compile go through."""
    wide = accumulate_dtype(x.dtype)
    own, step = x[:, 0].to(wide), delta[:, 0].to(wide)
    step = step if delta_bias is None else step + delta_bias.to(wide)
    step = (F.softplus(step) if delta_softplus else step).unsqueeze(-1)
    # One row of weights for each channel: (b, d, n).
    into, out = (w[:, 0].to(wide).repeat_interleave(x.shape[2] // w.shape[2], dim=1) for w in (B, C))
    state = step * own.unsqueeze(-1) * into
    if initial_state is not None:
        state = torch.addcmul(state, torch.exp(step * A.to(wide)), initial_state.to(wide))
    y = (state * out).sum(-1)
    y = y if D is None else torch.addcmul(y, D.to(wide), own)
    y = y if z is None else y * F.silu(z[:, 0].to(wide))
    return y.to(x.dtype).unsqueeze(1), state
