"""Tokens to experts and back: sorting, gathering, and adding up, repeatable to the bit on every device.

A route is a table of (token, choice) pairs, sorted by expert. Rows are only ever gathered: where autograd would scatter
gradients with atomic additions, the inverse permutation gathers them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ...utils.modes import transforming


class Route(NamedTuple):
    """Where n tokens go, k choices each: m = n · k rows, sorted by expert, and by token within an expert.

    Args:
        order: which (token, choice) pair, token · k + choice, each row is.
        place: the inverse: which row each pair is.
        counts: rows of each expert. Where pairs chose no expert, they add up to fewer than m.
    """

    order: Int[Tensor, " m"]
    place: Int[Tensor, " m"]
    counts: Int[Tensor, " e"]


def route(chosen: Int[Tensor, "n k"], experts: int) -> Route:
    """Sort tokens by the experts that they chose.

    Args:
        chosen: the experts, 0 to `experts` - 1. Larger numbers are no expert (a null expert, a dropped token): those
            rows come last, and `grouped_mm` makes zeros of them.
        experts: how many there are.
    """
    flat = chosen.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=flat.device, dtype=flat.dtype), right=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return Route(order=order, place=place, counts=ends.diff(prepend=ends.new_zeros(1)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(place)
        ctx.tokens, ctx.choices = x.shape[0], max(1, order.shape[0] // max(1, x.shape[0]))
        return x.index_select(0, order // ctx.choices)

    @staticmethod
    def backward(ctx, rows):
        (place,) = ctx.saved_tensors
        choices = place.view(ctx.tokens, ctx.choices).unbind(1)
        dx = rows.index_select(0, choices[0]).to(_wide(rows))
        for choice in choices[1:]:
            dx += rows.index_select(0, choice)
        return dx.to(rows.dtype), None, None


def dispatch(x: Float[Tensor, "n d"], to: Route) -> Float[Tensor, "m d"]:
    """The rows that the experts work on: row i is the token of pair `to.order[i]`."""
    if transforming():
        return x.index_select(0, to.order // max(1, to.order.shape[0] // max(1, x.shape[0])))
    return _Dispatch.apply(x, to.order, to.place)


def _combined(rows: Tensor, weight: Tensor, place: Tensor) -> Tensor:
    choices = place.view(weight.shape).unbind(1)
    wide = _wide(rows)
    y = rows.index_select(0, choices[0]).to(wide) * weight[:, :1].to(wide)
    for i, choice in enumerate(choices[1:], 1):
        y = y.addcmul_(rows.index_select(0, choice).to(wide), weight[:, i : i + 1].to(wide))
    return y.to(rows.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, order, place):
        ctx.save_for_backward(rows, weight, order, place)
        return _combined(rows, weight, place)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, order, place = ctx.saved_tensors
        drows = dweight = None
        if ctx.needs_input_grad[0]:
            by_row = weight.reshape(-1).index_select(0, order)[:, None]
            drows = (dy.index_select(0, order // weight.shape[1]) * by_row).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            dweight = _products(rows, dy, place.view(weight.shape)).to(weight.dtype)
        return drows, dweight, None, None


def _products(rows: Tensor, dy: Tensor, place: Tensor) -> Tensor:
    """<rows[place[i, j]], dy[i]>, as (n, k)."""
    dy = dy.to(_wide(dy))
    return torch.stack([(rows.index_select(0, choice) * dy).sum(1) for choice in place.unbind(1)], dim=1)


def combine(rows: Float[Tensor, "m d"], weight: Float[Tensor, "n k"], to: Route) -> Float[Tensor, "n d"]:
    """y_token = Σ_choice weight[token, choice] · rows[place of (token, choice)], in the rows' dtype.

    Raises:
        UnsupportedShape: there is not one row per weight.
    """
    if rows.shape[0] != weight.numel() or to.place.shape[0] != weight.numel():
        raise UnsupportedShape(f"weight: {tuple(weight.shape)} is not one weight for each of {rows.shape[0]} rows")
    if transforming():
        return _combined(rows, weight, to.place)
    return _Combine.apply(rows, weight, to.order, to.place)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, token, tokens):
        ctx.save_for_backward(rows, weight, token)
        wide = _wide(rows)
        weighted = rows.to(wide) * weight[:, None].to(wide)
        # On a CPU index_add_ goes through the rows in their order; elsewhere it adds atomically, in any order.
        add = _add_in_order if rows.device.type == "cpu" else _add_sorted
        return add(weighted, token, tokens).to(rows.dtype)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, token = ctx.saved_tensors
        by_row = dy.index_select(0, token)
        drows = (by_row * weight[:, None]).to(rows.dtype)
        return drows, (rows * by_row.to(_wide(rows))).sum(1).to(weight.dtype), None, None


def _add_in_order(rows: Tensor, token: Tensor, tokens: int) -> Tensor:
    return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token, rows)


def _add_sorted(rows: Tensor, token: Tensor, tokens: int) -> Tensor:
    ordered, order = torch.sort(token, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(tokens, device=token.device, dtype=token.dtype), right=True)
    boundaries = torch.cat([ends.new_zeros(1), ends])
    return torch.segment_reduce(rows.index_select(0, order), "sum", offsets=boundaries, axis=0, initial=0, unsafe=True)


def scatter(
    rows: Float[Tensor, "m d"], weight: Float[Tensor, " m"], token: Int[Tensor, " m"], tokens: int
) -> Float[Tensor, "n d"]:
    """y_i = Σ weight_r · rows_r over the rows r of token i: for tokens with unequal numbers of rows (expert choice).

    Args:
        rows: what the experts made, in any order.
        weight: one per row.
        token: the row's token, 0 to `tokens` - 1.
        tokens: n. A token without rows gets zeros.

    Raises:
        UnsupportedShape: there is not one weight and one token per row.
    """
    if weight.shape != rows.shape[:1] or token.shape != rows.shape[:1]:
        raise UnsupportedShape(
            f"rows: {rows.shape[0]} rows need as many weights and tokens, not {tuple(weight.shape)} and "
            f"{tuple(token.shape)}"
        )
    if transforming():
        wide = _wide(rows)
        weighted = rows.to(wide) * weight[:, None].to(wide)
        return weighted.new_zeros(tokens, rows.shape[1]).index_add(0, token, weighted).to(rows.dtype)
    return _Scatter.apply(rows, weight, token, tokens)
