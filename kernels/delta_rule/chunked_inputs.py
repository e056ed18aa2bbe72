"""What the chunked backend of `delta_rule` reads of a block, and how gradients go back to where that came from.

With G the cumulative log decay within a chunk, G' its last value and S the state at the chunk's start, the readers
X = [q; -h] (h the removal key, or b of the general form) and the writers W = [β k], or [-a; k] in the general form,
meet in the scores x_i e^{G_i - G_j} w_j and in the state, which x_i reads through e^{G_i} and w_j enters through
e^{G' - G_j}. (The general form's b reads the state before the decay, through e^{G_{i-1}}.) As in `gated_linear`,
e^{G_i - G_j} factorises into e^{G_i - G'} times e^{G' - G_j} while G' is at least -FACTORISE; otherwise scores are
made of e^{G_i - G_j} as it stands ("exact").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common.chunked_plan import FACTORISE, Block, Packing, Scratch, reversed_sum

# Steps in a chunk, and in the shorter ones that take over where that decays too much per channel. Powers of two.
LENGTH = 32
SHORT = 8


@dataclass(kw_only=True)
class Sequences:
    """The inputs, or their gradients: `(b, t, g, h / g or 1, width)`; None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor | None
    removal: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @staticmethod
    def of(tensors: dict[str, Tensor | None], groups: int, packing: Packing | None) -> Sequences:
        """From tensors as the op has them."""

        def lay_out(name: str, x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = packing.pack(x) if packing else x
            if name in ("v", "beta", "decay"):
                x = x.unflatten(2, (groups, -1))
                return x if x.dim() == 5 else x.unsqueeze(-1)
            return x.unsqueeze(3)

        laid_out: dict[str, Any] = {name: lay_out(name, x) for name, x in tensors.items()}
        return Sequences(**laid_out)


@dataclass(kw_only=True)
class Operands:
    """What the products of a block need; N runs over parts, chunks and heads, s is 1 or 2 (the general form).

    Args:
        readers: X `(N, 2 c, k)`, as they read the state.
        writers: W `(N, s c, k)`, as they enter the state.
        values: what W carries, `(N, s c, v)`: the first c rows are still to be found, the others hold v.
        right: v `(N, c, v)` in the delta form; None in the general one.
        scores: `(N, 2 c, s c)`, zero where a reader comes before (q), or not after (h), what is written.
        through: e^{G'} `(N, 1 or k, 1)`, or None.
        exact: the readers read the state at the chunk's start, not what the whole chunk's decay leaves of it; and the
            scores are not X Wᵀ.
        parts: into how many shorter chunks each chunk is divided.
    """

    readers: Tensor
    writers: Tensor
    values: Tensor
    right: Tensor | None
    scores: Tensor
    through: Tensor | None
    exact: bool
    parts: int


@dataclass(kw_only=True)
class Decays:
    """Of a block, `(parts, m, r, g, h / g, c or 1, 1 or k)`; `reach` is `total` as h sees it."""

    total: Tensor
    reach: Tensor
    into: Tensor
    out: tuple[Tensor, Tensor]
    through: Tensor


@lru_cache(maxsize=16)
def earlier(size: int, streams: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(2 c, s c)`: one where q_i sees step j (j <= i) and, below, where h_i does (j < i)."""
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return torch.cat([ones.tril(), ones.tril(-1)]).repeat(1, streams)


class Inputs:
    """Loads a block's operands from the sequences and stores their gradients."""

    def __init__(self, sequences: Sequences, dtype: torch.dtype):
        self.at, self.dtype = sequences, dtype
        self.general = sequences.a is not None
        self.streams = 2 if self.general else 1
        self.groups, self.heads = sequences.v.shape[2:4]
        self.scratch = Scratch(sequences.v, dtype)
        self.channel = sequences.decay is not None and sequences.decay.shape[-1] > 1
        # Below it e^decay is zero in this dtype; without the bound, sums of -1e4 would lose the small decays' digits.
        self.lowest = -746.0 if dtype == torch.float64 else -104.0

    def view(self, block: Block, x: Tensor, parts: int) -> Tensor:
        """`(b, t, g, h / g, w)` -> `(parts, m, r, g, h / g, c, w)`"""
        return block.view(x, parts).permute(2, 0, 1, 4, 5, 3, 6)

    def _lead(self, block: Block, parts: int) -> tuple[int, ...]:
        """`(parts, m, r, g, h / g, c)`"""
        rows = block.batch.stop - block.batch.start
        count = (block.time.stop - block.time.start) // block.chunk
        return (parts, count, rows, self.groups, self.heads, block.chunk // parts)

    # Decays.

    def _decays(self, block: Block) -> tuple[Decays | None, bool, int]:
        """The decays, whether these can not be factorised, and the number of parts."""
        lengths = [n for n in (LENGTH, SHORT) if block.chunk % n == 0] or [block.chunk]
        if self.at.decay is None:
            return None, False, block.chunk // lengths[0]
        for length in lengths if self.channel else lengths[:1]:
            parts = block.chunk // length
            steps = self.view(block, self.at.decay, parts)
            total = torch.cumsum(steps, -2, dtype=self.dtype, out=self.scratch("total", *steps.shape))
            exact = total[..., -1, :].amin().item() < -FACTORISE
            if not exact:
                break
        if exact:
            # In float64 the differences of large sums keep the digits of small decays. MPS has no float64.
            wide = self.dtype if steps.device.type == "mps" else torch.float64
            steps = steps.to(wide).clamp(min=self.lowest)
            total = steps.cumsum(-2)
        return self._factors(steps, total, exact), exact, parts

    def _factors(self, steps: Tensor, total: Tensor, exact: bool) -> Decays:
        last = total[..., -1:, :]
        # Of one dtype with the sums, whatever the decays' own.
        reach = torch.sub(total, steps.to(total.dtype)) if self.general else total
        if exact:
            into = (last - total).to(self.dtype).exp_()
            out = [x.to(self.dtype).exp() for x in ((total, reach) if self.general else (total,))]
        else:
            out = [torch.sub(total, last, out=self.scratch("out", *total.shape)).exp_()]
            into = torch.reciprocal(out[0], out=self.scratch("into", *total.shape))
            if self.general:
                out.append(torch.sub(reach, last, out=reach.new_empty(reach.shape)).exp_())
        through = last.to(self.dtype).exp()
        return Decays(total=total, reach=reach, into=into, out=(out[0], out[-1]), through=through)

    # Forwards.

    def _stack(self, name: str, block: Block, parts: int, *rows: tuple[Tensor, Tensor | float | None]) -> Tensor:
        """Tensors one above the other, each times its factor: `(parts, m, r, g, h / g, rows, c, w)`."""
        *lead, c = self._lead(block, parts)
        stacked = self.scratch(name, *lead, len(rows), c, rows[0][0].shape[-1])
        for i, (x, factor) in enumerate(rows):
            to = stacked.select(-3, i)
            x = self.view(block, x, parts).expand_as(to)
            if factor is None:
                to.copy_(x)
            else:
                torch.mul(x, factor, out=to)
        return stacked

    def _rows(self, name: str, block: Block, parts: int, decays: Decays | None) -> tuple[Tensor, Tensor]:
        """X and W, `(..., 2, c, k)` and `(..., s, c, k)`, with the decays where these are given."""
        at = self.at
        # The general form has a and b.
        a: Any = at.a
        b: Any = at.b
        h = b if self.general else at.k if at.removal is None else at.removal
        q_factor, h_factor, into = None, -1.0, None
        if decays is not None:
            (q_factor, reached), into = decays.out, decays.into
            h_factor = torch.neg(reached, out=self.scratch("minus", *reached.shape))
        readers = self._stack(f"{name} readers", block, parts, (at.q, q_factor), (h, h_factor))
        name = f"{name} writers"
        if self.general:
            a_factor = -1.0 if into is None else -into
            return readers, self._stack(name, block, parts, (a, a_factor), (at.k, into))
        if at.beta is None:
            return readers, self._stack(name, block, parts, (at.k, into))
        # A product of two bfloat16 tensors is rounded to bfloat16, wherever it is written.
        beta = self.view(block, at.beta, parts).to(self.dtype)
        if not self.channel:
            return readers, self._stack(name, block, parts, (at.k, beta if into is None else beta * into))
        writers = self._stack(name, block, parts, (at.k, into))
        writers.select(-3, 0).mul_(beta)
        return readers, writers

    def load(self, block: Block) -> Operands:
        decays, exact, parts = self._decays(block)
        self.decays = decays
        if decays is not None and exact:
            plain = self._rows("plain", block, parts, None)
            readers, writers = self.scratch("readers", *plain[0].shape), self.scratch("writers", *plain[1].shape)
            for i, out in enumerate(decays.out):
                torch.mul(plain[0].select(-3, i), out, out=readers.select(-3, i))
            torch.mul(plain[1], decays.into.unsqueeze(-3), out=writers)
        else:
            readers, writers = plain = self._rows("scaled", block, parts, decays)
        self.plain = plain
        *lead, c = self._lead(block, parts)
        n, dv = math.prod(lead), self.at.v.shape[-1]
        readers, writers = readers.view(n, 2 * c, -1), writers.view(n, self.streams * c, -1)
        scores = self.scratch("scores", n, 2 * c, self.streams * c)
        if decays is not None and exact:
            self._exact_scores(*plain, decays, scores)
        else:
            torch.bmm(readers, writers.mT, out=scores).mul_(self.seen(c))
        values, right = self.scratch("values", n, self.streams * c, dv), None
        if self.general:
            v = self.view(block, self.at.v, parts)
            values.view(*lead, 2, c, dv).select(-3, 1).copy_(v)
        else:
            right = self._stack("right", block, parts, (self.at.v, None)).view(n, c, dv)
        return Operands(
            readers=readers,
            writers=writers,
            values=values,
            right=right,
            scores=scores,
            through=None if decays is None else decays.through.reshape(n, 1, -1).mT,
            exact=exact,
            parts=parts,
        )

    def seen(self, c: int) -> Tensor:
        return earlier(c, self.streams, self.dtype, self.scratch("seen", 1).device)

    # Exact chunks.

    def _ratios(self, decays: Decays) -> Tensor:
        """e^{G_i - G_j} for q and h, zero where j is not seen: `(..., 2, c, c, 1 or k)`."""
        total = decays.total
        c = total.shape[-2]
        ratios = torch.stack([total, decays.reach], dim=-3).unsqueeze(-2) - total.unsqueeze(-3).unsqueeze(-3)
        unseen = self.seen(c)[:, :c].view(2, c, c, 1) == 0
        return ratios.to(self.dtype).masked_fill_(unseen, -torch.inf).exp_()

    def _exact_scores(self, readers: Tensor, writers: Tensor, decays: Decays, scores: Tensor) -> None:
        ratios = self._ratios(decays)
        *lead, s, c, dk = writers.shape
        scores = scores.view(*lead, 2, c, s, c)
        if not self.channel:
            n = math.prod(lead)
            torch.bmm(readers.view(n, 2 * c, dk), writers.view(n, s * c, dk).mT, out=scores.view(n, 2 * c, s * c))
            scores.mul_(ratios.squeeze(-1).unsqueeze(-2))
            return
        for i in range(2):
            for j in range(s):
                keys = ratios.select(-4, i) * writers.select(-3, j).unsqueeze(-3)
                scores[..., i, :, j, :] = torch.matmul(keys, readers.select(-3, i).unsqueeze(-1)).squeeze(-1)

    def _exact_gradients(self, dscores: Tensor, dreaders: Tensor, dwriters: Tensor) -> None:
        """Add what comes through the scores."""
        # Only decays make a chunk exact.
        decays: Any = self.decays
        ratios = self._ratios(decays)
        readers, writers = self.plain
        *lead, s, c, dk = writers.shape
        dscores = dscores.view(*lead, 2, c, s, c)
        if not self.channel:
            n = math.prod(lead)
            dscores = (dscores * ratios.squeeze(-1).unsqueeze(-2)).view(n, 2 * c, s * c)
            dreaders.view(n, 2 * c, dk).baddbmm_(dscores, writers.view(n, s * c, dk))
            dwriters.view(n, s * c, dk).baddbmm_(dscores.mT, readers.view(n, 2 * c, dk))
            return
        for i in range(2):
            for j in range(s):
                weights = ratios.select(-4, i) * dscores[..., i, :, j, :].unsqueeze(-1)
                dreaders.select(-3, i).add_((weights * writers.select(-3, j).unsqueeze(-3)).sum(-2))
                dwriters.select(-3, j).add_((weights * readers.select(-3, i).unsqueeze(-2)).sum(-3))

    # Backwards.

    def load_gradient(self, block: Block, x: Operands, doutput: Tensor, scale: float) -> Tensor:
        """`(N, 2 c, v)`: above, scale times the output's gradient; below, space for the right side's."""
        *lead, c = self._lead(block, x.parts)
        both = self.scratch("doutput", *lead, 2, c, doutput.shape[-1])
        # A product with a number is rounded to the dtype of the tensor, wherever it is written.
        both.select(-3, 0).copy_(self.view(block, doutput, x.parts)).mul_(scale)
        return both.view(-1, 2 * c, both.shape[-1])

    def store_output(self, block: Block, x: Operands, product: Tensor, scale: float, output: Tensor) -> None:
        output = self.view(block, output, x.parts)
        torch.mul(product.view(output.shape), scale, out=output)

    def store_gradients(
        self,
        block: Block,
        x: Operands,
        gradients: tuple[Tensor, Tensor, Tensor, Tensor],
        tails: Any,
        to: Sequences,
    ) -> None:
        """Take the decays' factors back, derive their gradients and those of the inputs.

        Args:
            gradients: of readers, writers, values (or the right side) and scores.
            tails: the gradient of G', `(N, 1 or k)`; None without one of the decays.
            to: where the inputs' gradients go.
        """
        dreaders, dwriters, dv, dscores = gradients
        *lead, _ = self._lead(block, x.parts)
        readers, writers = self.plain
        dreaders, dwriters = dreaders.view(readers.shape), dwriters.view(writers.shape)
        if to.decay is not None and not x.exact:
            self._store_decay(block, x, dreaders, dwriters, tails, to.decay)
        if self.decays is not None:
            for i, out in enumerate(self.decays.out):
                dreaders.select(-3, i).mul_(out)
            dwriters.mul_(self.decays.into.unsqueeze(-3))
        if x.exact:
            self._exact_gradients(dscores, dreaders, dwriters)
            if to.decay is not None:
                self._store_decay(block, x, dreaders, dwriters, tails, to.decay)
        self._give(block, x, dreaders.select(-3, 0), to.q)
        self.view(block, to.v, x.parts).copy_(dv.unflatten(0, lead))
        minus_dh, dw = dreaders.select(-3, 1), dwriters.select(-3, 0)
        if to.a is not None and to.b is not None:
            self._give(block, x, minus_dh.neg_(), to.b)
            self._give(block, x, dw.neg_(), to.a)
            self._give(block, x, dwriters.select(-3, 1), to.k)
            return
        if to.beta is not None:
            product = torch.mul(dw, self.view(block, self.at.k, x.parts), out=self.scratch("product", *dw.shape))
            self.view(block, to.beta, x.parts).copy_(product.sum(-1, keepdim=True))
            beta: Any = self.at.beta
            dw.mul_(self.view(block, beta, x.parts))
        if to.removal is None:
            dw.sub_(minus_dh)
        else:
            self._give(block, x, minus_dh.neg_(), to.removal)
        self._give(block, x, dw, to.k)

    def _give(self, block: Block, x: Operands, gradient: Tensor, to: Tensor) -> None:
        gradient = gradient if self.heads == 1 else gradient.sum(4, keepdim=True)
        self.view(block, to, x.parts).copy_(gradient)

    def _store_decay(
        self, block: Block, x: Operands, dreaders: Tensor, dwriters: Tensor, tails: Tensor, to: Tensor
    ) -> None:
        """e^{G_i} multiplies what x_i reads, e^{-G_j} what w_j writes: G_i has x_i dx_i - w_i dw_i, by channel."""
        readers, writers = self.plain
        own = torch.mul(readers.select(-3, 1), dreaders.select(-3, 1))
        gradient = torch.addcmul(own, readers.select(-3, 0), dreaders.select(-3, 0))
        for i in range(self.streams):
            gradient.addcmul_(writers.select(-3, i), dwriters.select(-3, i), value=-1)
        if not self.channel:
            own, gradient = own.sum(-1, keepdim=True), gradient.sum(-1, keepdim=True)
        suffix = torch.matmul(reversed_sum(gradient.shape[-2], self.dtype, gradient.device), gradient)
        suffix += tails.view(*gradient.shape[:-2], 1, -1)
        if self.general:
            suffix -= own
        self.view(block, to, x.parts).copy_(suffix)
