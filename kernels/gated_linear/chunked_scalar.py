"""The chunked form for a decay per step and head, where heads that share q and k also share all products with them.

The decay scales v and the output instead of q and k, so that q kᵀ, q S and kᵀ v are one product for all heads of a
group, (c, k) by (k, h / g * v): Mamba-2's sizes then run as large matrix products on the inputs as they lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.chunked_plan import FACTORISE, Block, reversed_sum
from .chunked_forms import Adjoint, Form, Operands


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What the decays of a region come to, each `(b, chunks, c or 1, g, h / g)`.

    Args:
        total: cumulative log decays within the chunk; `reach`: as far as the output sees them.
        out: on the output of a factorised chunk; `into`: on v; `through`: on the state.
        steep: for each sequence and chunk, whether it is too steep to be factorised.
        count: `(b, chunks, c)`, steps of the chunk up to this one, where the decay is constant per head.
    """

    total: Tensor
    reach: Tensor
    out: Tensor
    into: Tensor
    through: Tensor
    steep: list[list[bool]]
    count: Tensor | None


class ScalarForm(Form):
    """Operands are `(N, c, k)` and `(N, c, h / g * v)`, N running over chunks and groups."""

    def layout(self, dk: int, dv: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        self._regions: dict[tuple[int, int], Factors] = {}
        return (self.groups, dk, self.heads, dv), (dk, self.heads * dv)

    def import_state(self, state: Tensor) -> Tensor:
        split = state.unflatten(1, (self.groups, self.heads)).movedim(2, 3)
        return torch.empty_like(split, dtype=self.dtype, memory_format=torch.contiguous_format).copy_(split)

    def export_state(self, state: Tensor) -> Tensor:
        return state.movedim(3, 2).flatten(1, 2).contiguous()

    def overlap(self, dstate: Tensor, state: Tensor) -> Tensor:
        return torch.mul(dstate, state, out=self.scratch("dreads", *state.shape)).sum((2, 4))

    def _view(self, block: Block, x: Tensor) -> Tensor:
        """`(b, t, g, ...)` -> `(m, r, 1, g, c, ...)`"""
        return block.view(x).movedim(4, 3)

    def _region(self, block: Block) -> Factors:
        """The factors of the whole region, small tensors: calls in every block would cost more than the work."""
        key = (block.region.start, block.chunk)
        if key not in self._regions:
            # In float64 the differences of large sums keep the digits of small decays. MPS has no float64.
            wide = self.dtype if self.decay.device.type == "mps" else torch.float64
            steps = self.decay[:, block.region].to(wide).clamp(min=self.lowest).unflatten(1, (-1, block.chunk))
            total = steps.cumsum(2)
            last = total[:, :, -1:]
            reach = total - steps if self.exclusive else total
            self._regions[key] = Factors(
                total=total,
                reach=reach,
                out=(reach - last).to(self.dtype).exp().mul_(self.scale),
                into=(last - total).to(self.dtype).exp(),
                through=last.to(self.dtype).exp(),
                steep=(last.amin((2, 3, 4)) < -FACTORISE).tolist(),
                count=None if self.steps is None else self._count(block, self.steps),
            )
        return self._regions[key]

    def _count(self, block: Block, steps: Tensor) -> Tensor:
        return steps[:, block.region].to(self.dtype).unflatten(1, (-1, block.chunk)).cumsum(2)

    def load(self, block: Block) -> Operands:
        region = self._region(block)
        first = (block.time.start - block.region.start) // block.chunk
        chunks = slice(first, first + (block.time.stop - block.time.start) // block.chunk)

        def pick(x: Tensor) -> Tensor:
            """`(b, chunks, c, g, h / g)` -> `(m, r, 1, g, c, h / g)`"""
            return x[block.batch, chunks].transpose(0, 1).unsqueeze(2).movedim(4, 3)

        exact = any(any(row[chunks]) for row in region.steep[block.batch])
        within = {"total": pick(region.total), "reach": pick(region.reach)} if exact else {}
        out = within["reach"].to(self.dtype).exp().mul_(self.scale) if exact else pick(region.out)
        into = pick(region.into)
        if region.count is not None:
            count = region.count[block.batch, chunks].transpose(0, 1)[:, :, None, :, None]
            within["count"] = count.expand(-1, -1, self.groups, -1, -1).flatten(0, 2)
        return Operands(
            q=self.dense("q", self._view(block, self.q)),
            k=self.dense("k", self._view(block, self.k)),
            v=self._scaled("v", self._view(block, self.v), into),
            through=pick(region.through).unsqueeze(-1).flatten(0, 1),
            parts=1,
            exact=exact,
            extra={"out": out.unsqueeze(-1), "into": into.unsqueeze(-1), **within},
        )

    def _scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        scaled = torch.mul(x, factor.unsqueeze(-1), out=self.scratch(name, *x.shape))
        return scaled.view(-1, x.shape[4], self.matrix[1])

    def store(self, block: Block, x: Operands, product: Tensor, output: Tensor) -> None:
        output = self._view(block, output)
        product = product.view(output.shape)
        if x.exact:
            weights, _ = self._weights(x)
            within = torch.bmm(weights, self._per_head("v heads", self._view(block, self.v)))
            product.mul_(x.extra["out"]).add_(self._per_step(within, output), alpha=self.scale)
            output.copy_(product)
        else:
            torch.mul(product, x.extra["out"], out=output)

    def _per_head(self, name: str, x: Tensor) -> Tensor:
        """`(m, r, 1, g, c, h / g, v)` -> `(N * h / g, c, v)`"""
        x = x.movedim(5, 4)
        return self.scratch(name, *x.shape).copy_(x).view(-1, *x.shape[-2:])

    @staticmethod
    def _per_step(x: Tensor, like: Tensor) -> Tensor:
        """`(N * h / g, c, v)` -> `(m, r, 1, g, c, h / g, v)`"""
        *lead, c, heads, dv = like.shape
        return x.view(*lead, heads, c, dv).movedim(4, 5)

    def _weights(self, x: Operands) -> tuple[Tensor, Tensor]:
        """(q_i k_j) e^{b_i - b_j} `(N * h / g, c, c)` and e^{b_i - b_j} `(N, h / g, c, c)`; zero where j > i."""
        reach, total = (x.extra[n].mT.flatten(0, 3) for n in ("reach", "total"))
        (n, heads, c) = total.shape
        ratio = torch.sub(reach.unsqueeze(-1), total.unsqueeze(-2), out=self.scratch("ratio", n, heads, c, c))
        past = torch.ones(c, c, dtype=torch.bool, device=ratio.device).tril(-1 if self.exclusive else 0)
        ratio.masked_fill_(~past, -torch.inf).exp_()
        scores = torch.bmm(x.q, x.k.mT).unsqueeze(1)
        weights = torch.mul(ratio, scores, out=self.scratch("weights", n, heads, c, c))
        return weights.view(-1, c, c), ratio

    def load_gradient(self, block: Block, x: Operands, gradient: Tensor) -> Tensor:
        return self._scaled("doutput", self._view(block, gradient), x.extra["out"].squeeze(-1))

    def observe(self, block: Block, x: Operands, do: Tensor, reads: Tensor, dends: Tensor, dv: Tensor, into: Adjoint):
        """The gradient of a constant decay per head: each path from v_j to o_i counts as often as it decays.

        All paths are summed with their number of steps; as differences of do·o and v·dv (see `_store_decay`) the
        rounding of each would count once a step.
        """
        if into.decay is None or self.steps is None:
            return
        count = x.extra["count"]
        reach = self._reach(count)
        n = x.q.shape[0]
        paths = torch.bmm(x.q * reach, reads)
        if not x.exact:
            paths.baddbmm_(self.scores(x).mul_(reach - count.mT), x.v)
        last = count[:, -1:]
        paths.mul_(do).addcmul_(x.v * dv, last - count)
        through = torch.mul(reads, dends)
        if x.exact:
            through.view(n, -1, self.heads, dv.shape[-1] // self.heads).mul_(x.through.reshape(n, 1, self.heads, 1))
        total = paths.sum(1).add_(through.sum(1).mul_(last[:, 0]))
        self._add_per_head(into, total.unflatten(-1, (self.heads, -1)).sum(-1))

    def _reach(self, count: Tensor) -> Tensor:
        """Steps of the chunk that decay what o_i reads of the state at its start."""
        return count - count.diff(dim=1, prepend=torch.zeros_like(count[:, :1])) if self.exclusive else count

    def _add_per_head(self, into: Adjoint, gradient: Tensor) -> None:
        """`(N, h / g)`"""
        ddecay: Any = into.decay
        ddecay.add_(gradient.view(-1, self.groups, self.heads).sum(0))

    def store_gradients(self, block: Block, x: Operands, dq: Tensor, dk: Tensor, dv: Tensor, into: Adjoint) -> None:
        do, v = self._view(block, into.doutput), self._view(block, self.v)
        to = self._view(block, into.v)
        # Written where it belongs at once, if nothing is to be added or rounded.
        final = not x.exact and to.dtype == self.dtype
        dv = dv.view(v.shape)
        dv = torch.mul(dv, x.extra["into"], out=to if final else dv)
        if x.exact:
            weights, ratio = self._weights(x)
            do_heads = self._per_head("do heads", do).mul_(self.scale)
            v_heads = self._per_head("v heads", v)
            dweights = torch.bmm(do_heads, v_heads.mT).view(ratio.shape)
            if into.decay is not None and self.steps is not None:
                count = x.extra["count"]
                lag = (self._reach(count) - count.mT).unsqueeze(1)
                self._add_per_head(into, (dweights * weights.view(ratio.shape)).mul_(lag).sum((2, 3)))
            dscores = dweights.mul_(ratio).sum(1)
            dq.baddbmm_(dscores, x.k)
            dk.baddbmm_(dscores.mT, x.q)
            dv.add_(self._per_step(torch.bmm(weights.mT, do_heads), v))
        if not final:
            to.copy_(dv)
        for gradient, to in ((dq, into.q), (dk, into.k)):
            to = self._view(block, to)
            to.copy_(gradient.view(to.shape))
        if into.decay is not None and self.steps is None:
            self._store_decay(block, do, dv, into, into.decay)

    def _store_decay(self, block: Block, do: Tensor, dv: Tensor, into: Adjoint, ddecay: Tensor) -> None:
        """e^{b_i} multiplies all of o_i, and e^{-b_j} all that comes of v_j: b_i has do_i o_i - v_i dv_i."""
        to = self._view(block, ddecay)
        product = torch.mul(do, self._view(block, into.output), out=self.scratch("product", *dv.shape))
        reads = product.sum(-1) if self.exclusive else None
        gradient = product.addcmul_(self._view(block, self.v), dv, value=-1).sum(-1)
        suffix = torch.matmul(reversed_sum(block.chunk, self.dtype, dv.device), gradient)
        tails = self.tails(block, into, suffix[..., 0, :].flatten(0, 1))
        suffix += tails.view(*to.shape[:4], 1, self.heads)
        to.copy_(suffix if reads is None else suffix.sub_(reads))
