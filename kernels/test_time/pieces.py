"""How sequences are cut into mini-batches, and what gates make of the tokens of one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.graphs import for_every_length


class Pieces(NamedTuple):
    """Mini-batches, counted from each sequence's start, as rows of one tensor: (m, h, chunk, ...).

    A token's slot is its place in its mini-batch; slots before the call's first token, after its last, or of no
    sequence at all are empty. Pieces are in the order of waves: the first of every sequence, then the second of every
    sequence that has one, sequences with more pieces first.

    Attributes:
        chunk: tokens in a mini-batch.
        shape: b, t.
        sequences: how many there are.
        each: pieces of every sequence, where all start at 0 and are equally long; 0 otherwise.
        valid: slots that hold a token, (m, chunk); None where all do.
        counts: pieces of each sequence, largest first; this and what follows is None where `each` is not 0.
        order, rank: sequences in the order of the waves, and the inverse.
        ends: places of the sequences' ends, counted from the start of the mini-batch in which they begin.
        last_piece: of each sequence, in the order of the waves.
        token: number of the token in each slot, 0 in empty ones; (m, chunk).
        slot: number of each token's slot; (b t).
    """

    chunk: int
    shape: tuple[int, int]
    sequences: int
    each: int = 0
    valid: Any = None
    counts: Any = None
    order: Any = None
    rank: Any = None
    ends: Any = None
    last_piece: Any = None
    token: Any = None
    slot: Any = None


def pieces_of(v: Tensor, chunk: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Pieces:
    """The pieces of a call on v (b, t, h, k) that continues from `state`."""
    b, t = v.shape[:2]
    # A graph that is exported serves every length, and no comparison may fix what is left of one.
    if state is not None or cu_seqlens is not None or for_every_length():
        return _table(v, chunk, state, cu_seqlens)
    each = (t + chunk - 1) // chunk
    valid = None
    if t % chunk:
        inside = torch.arange(each * chunk, device=v.device) < t
        valid = inside.view(-1, 1, chunk).expand(-1, b, chunk).flatten(0, 1)
    return Pieces(chunk=chunk, shape=(b, t), sequences=b, each=each, valid=valid)


def _table(v: Tensor, chunk: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Pieces:
    """As many pieces as there could be, because their number depends on the data."""
    (b, t), device = v.shape[:2], v.device
    if cu_seqlens is None:
        n, most = b, b * ((t + 2 * chunk - 2) // chunk)
        edges = torch.arange(b + 1, device=device) * t
    else:
        n = cu_seqlens.shape[0] - 1
        edges, most = cu_seqlens.long(), t // chunk + 2 * n
    place = torch.zeros_like(edges[1:]) if state is None else state.detach()[:, 0, -1].round().long()
    ends = place + edges.diff()
    # An empty sequence has a piece too, of empty slots, so that every sequence has a first one.
    every = ((ends + chunk - 1) // chunk).clamp(min=1)
    counts, order = every.sort(descending=True, stable=True)
    rank = torch.argsort(order)
    # First one sequence after another, then sorted by wave and rank.
    row, total = torch.arange(most, device=device), every.cumsum(0)
    owner = torch.searchsorted(total, row, right=True)
    known = owner.clamp(max=n - 1)
    within = row - (total - every)[known]
    sorting = torch.argsort(torch.where(owner < n, within * n + rank[known], most * n + row))
    owner, within, known = owner[sorting], within[sorting], known[sorting]
    slot = within[:, None] * chunk + torch.arange(chunk, device=device)
    begin = place[known, None]
    valid = (owner < n)[:, None] & (slot >= begin) & (slot < ends[known, None])
    token = torch.where(valid, slot - begin + edges[known, None], 0)
    # Empty slots write after the last token.
    into = torch.where(valid, token, b * t).flatten()
    slots = torch.zeros(b * t + 1, dtype=torch.long, device=device)
    return Pieces(
        chunk=chunk,
        shape=(b, t),
        sequences=n,
        valid=valid,
        counts=counts,
        order=order,
        rank=rank,
        ends=ends,
        last_piece=torch.argsort(sorting)[total - 1][order],
        token=token,
        slot=slots.scatter(0, into, torch.arange(most * chunk, device=device))[:-1],
    )


# Functions rather than methods: torch.compile does not take the methods of a tuple that it builds.


def cut(pieces: Pieces, x: Tensor) -> Tensor:
    """(b, t, h, ...) as (m, h, chunk, ...); zeros in empty slots."""
    b, t = pieces.shape
    if pieces.each:
        padding = pieces.each * pieces.chunk - t
        if padding:
            x = torch.cat([x, x.new_zeros(b, padding, *x.shape[2:])], dim=1)
        return x.unflatten(1, (pieces.each, pieces.chunk)).transpose(0, 1).transpose(2, 3).flatten(0, 1).contiguous()
    found = x.flatten(0, 1)[pieces.token.flatten()].unflatten(0, pieces.token.shape)
    found = torch.where(pieces.valid.view(*pieces.valid.shape, *[1] * (x.ndim - 2)), found, 0)
    return found.transpose(1, 2).contiguous()


def join(pieces: Pieces, x: Tensor) -> Tensor:
    """The inverse of `cut`."""
    b, t = pieces.shape
    x = x.transpose(1, 2)
    if pieces.each:
        return x.unflatten(0, (pieces.each, b)).transpose(0, 1).flatten(1, 2)[:, :t].contiguous()
    return x.flatten(0, 1)[pieces.slot].unflatten(0, (b, t))


def by_wave(pieces: Pieces, x: Tensor) -> Tensor:
    """(n, ...) in the order of the waves."""
    return x if pieces.each else x[pieces.order]


def by_sequence(pieces: Pieces, x: Tensor) -> Tensor:
    """The inverse of `by_wave`."""
    return x if pieces.each else x[pieces.rank]


def final_place(pieces: Pieces, x: Tensor) -> Tensor:
    """Tokens that each sequence has read of its mini-batch, in the order of the waves, (n,) on x's device."""
    if pieces.each:
        return torch.full((pieces.sequences,), pieces.shape[1] % pieces.chunk, device=x.device)
    return (pieces.ends % pieces.chunk)[pieces.order]


def of_last_piece(pieces: Pieces, x: Tensor) -> Tensor:
    """Of (m, ...) what belongs to each sequence's last piece, (n, ...) in the order of the waves."""
    return x[-pieces.sequences :] if pieces.each else x[pieces.last_piece]


class Mixing(NamedTuple):
    """What tokens of a piece do to each other and to the state; see chunked.py and inner.py.

    Attributes:
        matrix: C, (m, h, c, c).
        beta, gamma: (m, h, c); None where they are 1, or where there is no momentum.
        coef, coef_s: C's last row, and S's; (m, h, c).
        gates: keep, feed and hold: β and γ of the last row, and S's own factor; (m, h, 3);
            None where there is neither decay nor momentum.
    """

    matrix: Tensor
    beta: Any
    gamma: Any
    coef: Tensor
    coef_s: Tensor | None
    gates: Tensor | None


def _products(factor: Tensor) -> Tensor:
    """P[s, j] = Π_{j < i ≤ s} factor_i below and on the diagonal, (..., c) -> (..., c, c).

    It inverts 1 minus the factors on the first subdiagonal, which takes no quotient and no difference of logarithms:
    factors of 0 and long products that underflow are exact.
    """
    size = factor.shape[-1]
    one = torch.eye(size, dtype=factor.dtype, device=factor.device)
    step = torch.diag_embed(factor[..., 1:], offset=-1)
    return torch.linalg.solve_triangular(one - step, one.expand_as(step), upper=False, unitriangular=True)


def mixing(pieces: Pieces, lr: Tensor, momentum: Tensor | None, decay: Tensor | None, wide: torch.dtype) -> Mixing:
    """C, β, γ and the rest from lr, momentum and decay (b, t, h)."""
    lr = cut(pieces, lr)
    full = lr.new_ones(1) if pieces.valid is None else pieces.valid[:, None].to(wide)
    matrix = torch.ones(pieces.chunk, pieces.chunk, dtype=wide, device=lr.device).tril()
    beta = gamma = coef_s = None
    keep, feed, hold = torch.ones_like(lr[..., -1]), *[torch.zeros_like(lr[..., -1])] * 2
    if decay is not None:
        # Empty slots leave everything as it is.
        factor = torch.where(full > 0, cut(pieces, decay.to(wide)).exp(), 1)
        matrix = _products(factor)
        beta = factor[..., :1] * matrix[..., 0]
        keep = beta[..., -1]
    if momentum is not None:
        factor = torch.where(full > 0, cut(pieces, momentum.to(wide)), 1)
        steps = _products(factor)
        own = factor[..., :1] * steps[..., 0]
        weighted = matrix * full[..., None, :]
        gamma = (weighted @ own[..., None])[..., 0]
        feed, hold = gamma[..., -1], own[..., -1]
        coef_s = -steps[..., -1, :] * lr
        matrix = weighted @ steps
    matrix = -matrix * lr[..., None, :]
    gated = decay is not None or momentum is not None
    gates = torch.stack([keep, feed, hold], dim=-1) if gated else None
    return Mixing(matrix, beta, gamma, matrix[..., -1, :], coef_s, gates)
