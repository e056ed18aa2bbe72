"""The chunked form for a decay per channel: q and k carry the decay, and every head has its own products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunked_plan import FACTORISE, Block, reversed_sum
from .chunked_forms import SHORT, Adjoint, Form, Operands


class ChannelForm(Form):
    """Operands are `(N, c, k)` and `(N, c, v)`, N running over chunks, their parts and heads.

    Where a chunk decays too much to be factorised it is divided into short ones, and where even these do, their scores
    are summed from e^{b_i - b_j} channel by channel.
    """

    def layout(self, dk: int, dv: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        return (self.groups * self.heads, dk, dv), (dk, dv)

    def import_state(self, state: Tensor) -> Tensor:
        return torch.empty_like(state, dtype=self.dtype, memory_format=torch.contiguous_format).copy_(state)

    def export_state(self, state: Tensor) -> Tensor:
        return state

    def overlap(self, dstate: Tensor, state: Tensor) -> Tensor:
        return torch.mul(dstate, state, out=self.scratch("dreads", *state.shape)).sum(-1)

    def _view(self, block: Block, x: Tensor, parts: int) -> Tensor:
        """`(b, t, g, ..., w)` -> `(m, r, parts, g, h / g or 1, c, w)`"""
        x = block.view(x, parts)
        x = x if x.dim() == 7 else x.unsqueeze(5)
        return x.movedim(3, 5)

    def _decays(self, block: Block) -> tuple[Tensor, Tensor, bool, int]:
        """The log decays, their running sums, whether these can not be factorised, and the number of parts."""
        short = block.chunk // SHORT if block.chunk % SHORT == 0 else 1
        for parts in dict.fromkeys((1, short)):
            steps = self._view(block, self.decay, parts)
            total = torch.cumsum(steps, -2, dtype=self.dtype, out=self.scratch("total", *steps.shape))
            if not total[..., -1, :].amin().item() < -FACTORISE:
                return steps, total, False, parts
        steps = self.scratch("steps", *steps.shape).copy_(steps).clamp_(min=self.lowest)
        return steps, torch.cumsum(steps, -2, out=total), True, parts

    def load(self, block: Block) -> Operands:
        steps, total, exact, parts = self._decays(block)
        last = total[..., -1:, :]
        shape, flat = total.shape, (-1, *total.shape[-2:])
        reach = total.sub(steps) if self.exclusive else total
        out = self.scratch("out", *shape)
        out = torch.exp(reach, out=out) if exact else torch.sub(reach, last, out=out).exp_()
        into = self.scratch("into", *shape)
        if exact or self.exclusive:
            torch.sub(last, total, out=into).exp_()
        else:
            torch.reciprocal(out, out=into)
        q, k, v = (self._view(block, x, parts) for x in (self.q, self.k, self.v))
        return Operands(
            q=torch.mul(q, out, out=self.scratch("q", *shape)).view(flat),
            k=torch.mul(k, into, out=self.scratch("k", *shape)).view(flat),
            v=self.dense("v", v),
            through=last.exp().flatten(3, 4).flatten(0, 1).mT,
            parts=parts,
            exact=exact,
            extra={"out": out, "into": into, "total": total, "reach": reach},
        )

    def store(self, block: Block, x: Operands, product: Tensor, output: Tensor) -> None:
        if x.exact:
            product.baddbmm_(self._exact(block, x)[0], x.v)
        output = self._view(block, output, x.parts)
        torch.mul(product.view(output.shape), self.scale, out=output)

    def _exact(self, block: Block, x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores `(N, c, c)`, e^{b_i - b_j} `(N, c, c, k)` (zero where j > i), and q and k per head `(N, c, k)`."""
        total, reach = x.extra["total"], x.extra["reach"]
        shape = total.shape
        n, c, dk = x.q.shape
        q, k = (
            self.scratch(f"plain {name}", *shape).copy_(self._view(block, source, x.parts)).view(n, c, dk)
            for name, source in (("q", self.q), ("k", self.k))
        )
        ratio = self.scratch("ratio", n, c, c, dk)
        torch.sub(reach.view(n, c, 1, dk), total.view(n, 1, c, dk), out=ratio)
        past = torch.ones(c, c, dtype=torch.bool, device=ratio.device).tril(-1 if self.exclusive else 0)
        ratio.masked_fill_(~past.unsqueeze(-1), -torch.inf).exp_()
        keys = torch.mul(ratio, k.unsqueeze(1), out=self.scratch("keys", n, c, c, dk))
        scores = torch.bmm(keys.view(n * c, c, dk), q.reshape(n * c, dk, 1))
        return scores.view(n, c, c), ratio, q, k

    def load_gradient(self, block: Block, x: Operands, gradient: Tensor) -> Tensor:
        gradient = self._view(block, gradient, x.parts)
        # A product with a number is rounded to the dtype of the tensor, wherever it is written.
        return self.scratch("doutput", *gradient.shape).copy_(gradient).mul_(self.scale).view(x.v.shape)

    def store_gradients(self, block: Block, x: Operands, dq: Tensor, dk: Tensor, dv: Tensor, into: Adjoint) -> None:
        shape = x.extra["out"].shape
        # Written where they belong at once, if nothing is to be added or rounded.
        final = not x.exact and self.heads == 1 and into.q.dtype == into.k.dtype == self.dtype
        dq, dk = dq.view(shape), dk.view(shape)
        to_q, to_k, to_v = (self._view(block, to, x.parts) for to in (into.q, into.k, into.v))
        dq = torch.mul(dq, x.extra["out"], out=to_q if final else dq)
        dk = torch.mul(dk, x.extra["into"], out=to_k if final else dk)
        if x.exact:
            do = self.load_gradient(block, x, into.doutput)
            scores, ratio, q, k = self._exact(block, x)
            dv.baddbmm_(scores.mT, do)
            ratio.mul_(torch.bmm(do, x.v.mT).unsqueeze(-1))
            dq += (ratio * k.unsqueeze(1)).sum(2).view(shape)
            dk += (ratio * q.unsqueeze(2)).sum(1).view(shape)
        if into.decay is not None:
            self._store_decay(block, x, dq, dk, into, into.decay)
        for gradient, to in () if final else ((dq, to_q), (dk, to_k)):
            to.copy_(gradient if self.heads == 1 else gradient.sum(4, keepdim=True))
        to_v.copy_(dv.view(to_v.shape))

    def _store_decay(self, block: Block, x: Operands, dq: Tensor, dk: Tensor, into: Adjoint, ddecay: Tensor) -> None:
        """e^{b_i} multiplies q_i, and e^{-b_j} k_j: the gradient of b_i is q_i dq_i - k_i dk_i, channel by channel."""
        to = self._view(block, ddecay, x.parts)
        n, c, dk_size = x.q.shape
        gradient = torch.mul(self._view(block, self.q, x.parts), dq, out=self.scratch("gradient", *to.shape))
        reads = gradient.clone() if self.exclusive else None
        gradient.addcmul_(self._view(block, self.k, x.parts), dk, value=-1)
        sums = reversed_sum(c, self.dtype, dq.device).expand(n, c, c)
        suffix = torch.bmm(sums, gradient.view(n, c, dk_size), out=self.scratch("suffix", n, c, dk_size))
        tails = self.tails(block, into, suffix[:, 0].view(*x.through.shape[:-1]))
        suffix, tails = suffix.view(to.shape), tails.view(*to.shape[:-2], 1, dk_size)
        torch.add(suffix, tails, out=to if reads is None else suffix)
        if reads is not None:
            torch.sub(suffix, reads, out=to)
