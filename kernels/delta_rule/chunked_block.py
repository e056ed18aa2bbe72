"""The chunked algebra of `delta_rule` on one block, forwards and backwards.

Within a chunk, with X = [q; -h], W and scores P as in `chunked_inputs` (P_q and P_h their rows of q and of -h), R what
is left of the state at the chunk's start, and E the errors that W writes:

    (I - P_h) E = V - H R,     O = Q R + P_q E,     S' = R + Wᵀ E

(the WY form of DeltaNet, arXiv 2406.06484, section 3, and of Gated DeltaNet, arXiv 2412.06464, section 3.3). The
general form a bᵀ + k vᵀ has W = [-a; k] and values [E; V]; the right side of its system is P_hk V - H R.

With T = (I - P_h)^{-1} only two products a chunk are left to be done one chunk after the other: E = T V - (T H) R and
S'. The gradients run backwards in the same way, with T transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunked_plan import Block
from .chunked_inputs import Inputs, Operands, Sequences

# Up to this size a triangular matrix is inverted by substitution; larger ones by halves, with matrix products.
SUBSTITUTE = 16


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I - L)^{-1} for strictly lower triangular L `(n, c, c)`.

    By substitution, not by powers of L: these cancel badly where keys repeat and β is near 2.
    """
    c = lower.shape[-1]
    if c <= SUBSTITUTE or c % 2:
        eye = torch.eye(c, dtype=lower.dtype, device=lower.device).expand(lower.shape)
        return torch.linalg.solve_triangular(lower.neg(), eye, upper=False, unitriangular=True)
    half = c // 2
    corners = unit_lower_inverse(torch.cat([lower[:, :half, :half], lower[:, half:, half:]]))
    first, second = corners.chunk(2)
    inverse = lower.new_zeros(lower.shape)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, half:, :half] = torch.bmm(torch.bmm(second, lower[:, half:, :half]), first)
    return inverse


def in_order(block: Block, parts: int, *slots: Tensor) -> list[tuple[Tensor, ...]]:
    """`(N, ...)` each -> in order of time, the slices `(sequences * h, ...)` that are handled at once."""
    counts = [n for _, n in block.steps]
    heads = slots[0].shape[0] // (parts * sum(counts))
    sizes = [n * heads for n in counts] * parts
    pieces = list(zip(*(x.split(sizes) for x in slots), strict=True))
    return [pieces[p * len(counts) + i] for i in range(len(counts)) for p in range(parts)]


class Blocks:
    """One block at a time, forwards or backwards."""

    def __init__(self, inputs: Inputs, scale: float):
        self.inputs, self.scale, self.scratch = inputs, scale, inputs.scratch

    def _solve(self, x: Operands) -> tuple[Tensor, Tensor]:
        """T, and T H; the values become T V where they are still to be found."""
        c = x.readers.shape[1] // 2
        inverse = unit_lower_inverse(x.scores[:, c:, :c])
        right = x.right
        if right is None:
            right = torch.bmm(x.scores[:, c:, c:], x.values[:, c:])
        torch.bmm(inverse, right, out=x.values[:, :c])
        return inverse, torch.bmm(inverse, x.readers[:, c:])

    def _advance(self, block: Block, x: Operands, removes: Tensor, state: Tensor) -> Tensor:
        """Find the values and move `state`, in place, over the block; returns what each chunk reads, `(N, k, v)`."""
        n, c, _ = removes.shape
        reads = self.scratch("reads", n, *state.shape[-2:])
        gates = () if x.through is None else (x.through,)
        for read, writers, values, remove, *through in in_order(
            block, x.parts, reads, x.writers, x.values, removes, *gates
        ):
            now = state[: read.shape[0]]
            if through and not x.exact:
                torch.mul(now, through[0], out=read)
            else:
                read.copy_(now)
            values[:, :c].baddbmm_(remove, read)
            if x.exact:
                now.mul_(through[0]).baddbmm_(writers.mT, values)
            else:
                torch.baddbmm(read, writers.mT, values, out=now)
        return reads

    def forward(self, block: Block, state: Tensor, output: Tensor) -> None:
        """Write the block's output and move `state` `(sequences * h, k, v)`, in place, to its end."""
        x = self.inputs.load(block)
        _, removes = self._solve(x)
        reads = self._advance(block, x, removes, state)
        n, c, _ = removes.shape
        product = self.scratch("product", n, c, state.shape[-1])
        torch.bmm(x.scores[:, :c], x.values, out=product).baddbmm_(x.readers[:, :c], reads)
        self.inputs.store_output(block, x, product, self.scale, output)

    def _retreat(
        self, block: Block, x: Operands, slots: tuple[Tensor, ...], dstate: Tensor, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Move `dstate`, in place, to the block's start; complete the errors' gradients.

        Args:
            slots: `(N, ...)`: what each chunk reads, T H, and the gradients of the errors and of the reads that come
                through the chunk's output.
            tail: the gradient of the last chunks' G', `(sequences * h, 1 or k)`; it moves along in place.

        Returns:
            Of each chunk, the gradient of the state at its end `(N, k, v)`, and that of G' `(N, 1 or k)`.
        """
        reads, removes, _, _ = slots
        c = removes.shape[1]
        dends, tails = self.scratch("dends", *reads.shape), None
        gates: tuple[Tensor, ...] = ()
        if tail is not None and x.through is not None:
            tails = self.scratch("tails", reads.shape[0], tail.shape[-1])
            gates = (x.through, tails)
        for read, remove, derrors, dread, writers, dend, *gate in reversed(
            in_order(block, x.parts, *slots, x.writers, dends, *gates)
        ):
            now = dstate[: read.shape[0]]
            dend.copy_(now)
            derrors.baddbmm_(writers[:, :c], now)
            dread.baddbmm_(remove.mT, derrors)
            if x.exact:
                now.mul_(gate[0]).add_(dread)
            else:
                now.add_(dread)
            if gate and tail is not None:
                # Taken from the state itself in every chunk: in a running sum rounding would pile up.
                gate[1].copy_(tail[: read.shape[0]])
                self._overlap(now, read, tail[: read.shape[0]])
            if gate and not x.exact:
                now.mul_(gate[0])
        return dends, tails

    def _overlap(self, dstate: Tensor, state: Tensor, out: Tensor) -> None:
        overlap = torch.mul(dstate, state, out=self.scratch("overlap", *state.shape))
        if self.inputs.channel:
            torch.sum(overlap, -1, out=out)
        else:
            torch.sum(overlap.flatten(1), -1, keepdim=True, out=out)

    def backward(
        self, block: Block, state: Tensor, dstate: Tensor, doutput: Tensor, tail: Tensor | None, to: Sequences
    ) -> None:
        """Write the block's gradients to `to`; move `dstate` and `tail`, in place, to its start, where `state` is."""
        x = self.inputs.load(block)
        inverse, removes = self._solve(x)
        c = removes.shape[1]
        reads = self._advance(block, x, removes, state)
        sides = self.inputs.load_gradient(block, x, doutput, self.scale)
        do = sides[:, :c]
        derrors = torch.bmm(x.scores[:, :c, :c].mT, do, out=self.scratch("derrors", *do.shape))
        dreads = torch.bmm(x.readers[:, :c].mT, do, out=self.scratch("dreads", *reads.shape))
        dends, tails = self._retreat(block, x, (reads, removes, derrors, dreads), dstate, tail)
        torch.bmm(inverse.mT, derrors, out=sides[:, c:])
        dscores = torch.bmm(sides, x.values.mT, out=self.scratch("dscores", *x.scores.shape))
        dreaders = torch.bmm(sides, reads.mT, out=self.scratch("dreaders", *x.readers.shape))
        dwriters = torch.bmm(x.values, dends.mT, out=self.scratch("dwriters", *x.writers.shape))
        if not x.exact:
            dscores.mul_(self.inputs.seen(c))
            dreaders.baddbmm_(dscores, x.writers)
            dwriters.baddbmm_(dscores.mT, x.readers)
        if x.right is None:
            dvalues = torch.bmm(x.scores[:, :, c:].mT, sides).baddbmm_(x.writers[:, c:], dends)
        else:
            dvalues = sides[:, c:]
        self.inputs.store_gradients(block, x, (dreaders, dwriters, dvalues, dscores), tails, to)
