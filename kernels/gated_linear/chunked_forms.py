"""The chunked algebra of `gated_linear` on one block, in two forms: a decay per channel and a decay per step and head.

With b the cumulative log decay within a chunk, b' its last value, S the state at the chunk's start:

    o_i  = scale (e^{b_i} q_i)ᵀ S + scale Σ_{j<=i} (q_i e^{b_i - b_j} k_j) v_j
    S'   = e^{b'} S + Σ_j (e^{b' - b_j} k_j) v_jᵀ

(GLA, arXiv 2312.06635, section 4; Mamba-2, arXiv 2405.21060, section 6). e^{b_i - b_j} factorises into e^{b_i - b'}
times e^{b' - b_j}: all is then plain products of Q = q e^{b - b'}, K = k e^{b' - b} and R = e^{b'} S,

    O = tril(Q Kᵀ) V + Q R,     S' = R + Kᵀ V.

The first factor grows up to e^{-b'}, so that form is only taken while b' is at least -FACTORISE; otherwise the part
within the chunk takes e^{b_i - b_j} as it stands ("exact").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.chunked_plan import Block, Scratch

# Length of the sub-chunks that take over where a whole chunk decays too much per channel.
SHORT = 16


@dataclass(kw_only=True)
class Operands:
    """What the shared products of a block need.

    Args:
        q, k, v: `(N, c, ...)`, scaled with their share of the decay.
        through: e^{b'}, to be multiplied with `(chunks, parts, *state shape)`.
        parts: into how many shorter chunks each chunk is divided.
        exact: the part within a chunk is left to the form; q reads the state at the chunk's start, not R.
        extra: the form's own tensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    through: Tensor
    parts: int
    exact: bool
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Adjoint:
    """What a backward pass reads (`output`, `doutput`) and where it writes the gradients, in the layout of the inputs.

    `decay` is None where its gradient is not wanted, and `(g, h / g)` for a constant decay per head. `tail` holds, per
    sequence, the gradient of the last cumulative decay of the next chunk on the way back: what later steps and the
    final state contribute; it moves along in place.
    """

    output: Tensor
    doutput: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    tail: Tensor


def in_order(block: Block, *slots: Tensor) -> list[tuple[Tensor, ...]]:
    """`(chunks, parts, ...)` each -> in order of time, the slices `(sequences, ...)` that may be handled at once."""
    counts = [n for _, n in block.steps]
    parts = [zip(*(x[:, p].split(counts) for x in slots), strict=True) for p in range(slots[0].shape[1])]
    return [at for step in zip(*parts, strict=True) for at in step]


class Form:
    """One block at a time, forwards or backwards; the subclasses scale, store and handle exact chunks.

    Args:
        q, k: `(b, t, g, k)`.
        v: `(b, t, g, h / g, v)`.
        decay: `(b, t, g, h / g)` or `(b, t, g, h / g, k)`.
        exclusive: the output reads the state before the update, without the current token.
        steps: `(b, t)`, 1 for each step and 0 for padding, where one decay per head holds for all steps; else None.
    """

    def __init__(
        self, *, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, exclusive: bool, steps: Tensor | None
    ):
        self.q, self.k, self.v, self.decay, self.steps = q, k, v, decay, steps
        self.scale, self.exclusive = scale, exclusive
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.scratch = Scratch(v, self.dtype)
        # Below it e^decay is zero in this dtype; without the bound, sums of -1e4 would lose the small decays' digits.
        self.lowest = -746.0 if self.dtype == torch.float64 else -104.0
        self.groups, self.heads = v.shape[2:4]
        self.state_shape, self.matrix = self.layout(q.shape[-1], v.shape[-1])

    # What the forms differ in.

    def layout(self, dk: int, dv: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The layout of one sequence's state, and the shape of the matrices in it that the products take."""
        raise NotImplementedError

    def import_state(self, state: Tensor) -> Tensor:
        """`(n, h, k, v)` -> `(n, *state_shape)`, a copy of its own."""
        raise NotImplementedError

    def export_state(self, state: Tensor) -> Tensor:
        raise NotImplementedError

    def overlap(self, dstate: Tensor, state: Tensor) -> Tensor:
        """The gradient of the last cumulative decay before a state: their product, summed over what a decay spans."""
        raise NotImplementedError

    def load(self, block: Block) -> Operands:
        raise NotImplementedError

    def store(self, block: Block, x: Operands, product: Tensor, output: Tensor) -> None:
        """Turn the products `(N, c, w)` into the output; add the part within exact chunks."""
        raise NotImplementedError

    def load_gradient(self, block: Block, x: Operands, gradient: Tensor) -> Tensor:
        """The output's gradient as `(N, c, w)`, scaled so that it is the gradient of the products."""
        raise NotImplementedError

    def observe(self, block: Block, x: Operands, do: Tensor, reads: Tensor, dends: Tensor, dv: Tensor, into: Adjoint):
        """Called before the states are overwritten, while dv holds what comes through the state alone."""

    def store_gradients(self, block: Block, x: Operands, dq: Tensor, dk: Tensor, dv: Tensor, into: Adjoint) -> None:
        """Undo the scaling of dq, dk, dv, add what exact chunks lack, and derive the decay's gradient."""
        raise NotImplementedError

    # What they share.

    def dense(self, name: str, x: Tensor) -> Tensor:
        """`(m, r, p, ..., c, w)` -> `(N, c, w)` in the working dtype, copied only where it must be."""
        lead = x.shape[:-2]
        several = [n for n in lead if n > 1]
        if x.dtype == self.dtype and len(several) <= 1 and x.stride(-1) == 1:
            return x.flatten(0, -3)
        return self.scratch(name, *x.shape).copy_(x).view(-1, *x.shape[-2:])

    def tails(self, block: Block, into: Adjoint, sums: Tensor) -> Tensor:
        """Given the sums of the decays' gradients in each chunk, `(chunks, parts, ...)`, the tail each of them has."""
        tails = torch.empty_like(sums)
        for tail, chunk in reversed(in_order(block, tails, sums)):
            now = into.tail[block.states][: tail.shape[0]]
            tail.copy_(now)
            now.add_(chunk)
        return tails

    def scores(self, x: Operands) -> Tensor:
        n, c, _ = x.q.shape
        scores = torch.bmm(x.q, x.k.mT, out=self.scratch("scores", n, c, c))
        return scores.tril_(-1 if self.exclusive else 0)

    def _slots(self, name: str, block: Block, parts: int) -> Tensor:
        count = sum(n for _, n in block.steps)
        return self.scratch(name, count, parts, *self.state_shape)

    def _flat(self, states: Tensor) -> Tensor:
        return states.view(-1, *self.matrix)

    def advance(self, block: Block, x: Operands, state: Tensor) -> Tensor:
        """Move `state`, in place, over the block; returns what each chunk's queries read, `(chunks, parts, ...)`."""
        reads = self._slots("reads", block, x.parts)
        writes = self._slots("writes", block, x.parts)
        torch.bmm(x.k.mT, x.v, out=self._flat(writes))
        for read, write, through in in_order(block, reads, writes, x.through):
            now = state[: read.shape[0]]
            if x.exact:
                read.copy_(now)
                torch.addcmul(write, now, through, out=now)
            else:
                torch.mul(now, through, out=read)
                torch.add(write, read, out=now)
        return reads

    def retreat(self, block: Block, x: Operands, do: Tensor, dstate: Tensor) -> Tensor:
        """Move `dstate`, in place, to the block's start; returns the gradient at each chunk's end."""
        dends = self._slots("dends", block, x.parts)
        dreads = self._slots("dreads", block, x.parts)
        torch.bmm(x.q.mT, do, out=self._flat(dreads))
        for dend, dread, through in reversed(in_order(block, dends, dreads, x.through)):
            now = dstate[: dend.shape[0]]
            dend.copy_(now)
            if x.exact:
                torch.addcmul(dread, now, through, out=now)
            else:
                now.add_(dread).mul_(through)
        return dends

    def forward(self, block: Block, state: Tensor, output: Tensor) -> None:
        """Write the block's output and move `state`, in place, to its end."""
        x = self.load(block)
        single = len(block.steps) == 1 and x.parts == 1
        now = state[: block.alive]
        if single and not x.exact:
            now.mul_(x.through[:, 0])
        reads = self._flat(now if single else self.advance(block, x, state))
        product = self.scratch("product", *x.v.shape)
        if x.exact:
            torch.bmm(x.q, reads, out=product)
        else:
            torch.bmm(self.scores(x), x.v, out=product)
            product.baddbmm_(x.q, reads)
        if single:
            # With one chunk the state itself serves as what is read: two passes over it fewer.
            if x.exact:
                now.mul_(x.through[:, 0])
            reads.baddbmm_(x.k.mT, x.v)
        self.store(block, x, product, output)

    def backward(self, block: Block, start: Tensor, dstate: Tensor, into: Adjoint) -> None:
        """Write the block's gradients and move `dstate`, in place, to its start, where the state was `start`."""
        x = self.load(block)
        single = len(block.steps) == 1 and x.parts == 1
        do = self.load_gradient(block, x, into.doutput)
        if single:
            through = x.through[:, 0]
            reads = start if x.exact else torch.mul(start, through, out=self.scratch("reads", *start.shape))
            dends = dstate[: block.alive]
        else:
            reads = self.advance(block, x, self.scratch("state", *start.shape).copy_(start))
            dends = self.retreat(block, x, do, dstate)
        reads, dends = self._flat(reads), self._flat(dends)
        dq = torch.bmm(do, reads.mT, out=self.scratch("dq", *x.q.shape))
        dk = torch.bmm(x.v, dends.mT, out=self.scratch("dk", *x.k.shape))
        dv = torch.bmm(x.k, dends, out=self.scratch("dv", *x.v.shape))
        self.observe(block, x, do, reads, dends, dv, into)
        if single:
            if x.exact:
                dstate[: block.alive].mul_(through)
            dends.baddbmm_(x.q.mT, do)
            if not x.exact:
                dstate[: block.alive].mul_(through)
        if not x.exact:
            dv.baddbmm_(self.scores(x).mT, do)
            dscores = torch.bmm(do, x.v.mT, out=self.scratch("scores", *x.q.shape[:2], x.q.shape[1]))
            dscores.tril_(-1 if self.exclusive else 0)
            dq.baddbmm_(dscores, x.k)
            dk.baddbmm_(dscores.mT, x.q)
        self.store_gradients(block, x, dq, dk, dv, into)
