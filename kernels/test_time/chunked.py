"""Test-time training in its dual form: products over mini-batches (TTT, arXiv 2407.04620, section 2.5).

Only the inner gradients need the weights in their order; they are found mini-batch by mini-batch in `inner`. With them
every token reads its own weights without their being made: a token s of a piece sees

    W_s = β_s W + γ_s S + Σ_{r ≤ s} C_{sr} [x_r, 1] d_rᵀ,   so   q̃_s W_s = β_s q̃_s W + γ_s q̃_s S + ((q̃ x̃ᵀ) ⊙ C) D,

where C, β and γ follow from lr, momentum and decay alone (`pieces.mixing`), and the last row moves the weights on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner import inner, with_one
from .memory import flat_weights, layers_of, state_parts
from .pieces import (
    Mixing,
    Pieces,
    by_sequence,
    by_wave,
    cut,
    final_place,
    join,
    mixing,
    of_last_piece,
    pieces_of,
)


def test_time_chunked(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w1: Tensor,
    b1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w2: Tensor | None,
    b2: Tensor | None,
    momentum: Tensor | None,
    decay: Tensor | None,
    chunk: int,
    eps: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.test_time`."""
    wide = torch.promote_types(v.dtype, torch.float32)
    size, hidden = v.shape[-1], None if w2 is None else w1.shape[2]
    weight, bias = norm_weight.to(wide), norm_bias.to(wide)
    state = None if initial_state is None else initial_state.to(wide)
    pieces = pieces_of(v, chunk, state, cu_seqlens)
    q, k, target = (cut(pieces, x.to(wide)) for x in (q, k, v.to(wide) - k.to(wide)))
    first = flat_weights(w1, b1, w2, b2, wide)
    start, now, step = _initial(first, state, pieces, size, hidden, momentum is not None)
    mixed = mixing(pieces, lr.to(wide), momentum, decay, wide)
    x = with_one(k)
    last, values, d_first, used, fed, final, final_s = inner(
        x,
        (bias[:, None] - target) * weight[:, None],
        weight.square(),
        mixed.coef,
        mixed.coef_s,
        mixed.gates,
        start,
        now,
        step,
        pieces.counts,
        hidden or 0,
        eps,
    )
    # The first piece of a sequence continues from the weights now, every other from those it began with.
    weights = layers_of(torch.cat([now, used[pieces.sequences :]]), size, hidden)
    steps = [None] * len(weights) if step is None else layers_of(fed, size, hidden)
    z = _read(with_one(q), x, weights[0], steps[0], last if hidden is None else d_first, mixed)
    if hidden is not None:
        z = _read(with_one(F.gelu(z)), with_one(F.gelu(values)), weights[1], steps[1], last, mixed)
    unit = F.layer_norm(z, (size,), eps=eps)
    output = torch.addcmul(q + bias[:, None], unit, weight[:, None])
    state = _final(first, pieces, used, final, final_s if step is not None else None)
    return join(pieces, output).to(v.dtype), state


def _initial(
    first: Tensor, state: Tensor | None, pieces: Pieces, size: int, hidden: int | None, has_momentum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """W°, W and S before the first piece, (n, h, p) in the order of the waves."""
    if state is None:
        weights = first.expand(pieces.sequences, *first.shape)
        return weights, weights, torch.zeros_like(weights) if has_momentum else None
    parts = state_parts(by_wave(pieces, state), size, hidden, momentum=has_momentum)
    return first + parts["start"], first + parts["now"], parts.get("momentum")


def _read(q: Tensor, x: Tensor, weights: Tensor, steps: Tensor | None, d: Tensor, mixed: Mixing) -> Tensor:
    """What each token reads with its own weights: q (m, h, c, i + 1), weights (m, h, i + 1, o) -> (m, h, c, o)."""
    z = q @ weights
    if mixed.beta is not None:
        z = z * mixed.beta[..., None]
    if steps is not None:
        z = z + (q @ steps) * mixed.gamma[..., None]
    return z + ((q @ x.mT) * mixed.matrix) @ d


def _final(first: Tensor, pieces: Pieces, used: Tensor, final: Tensor, final_s: Tensor | None) -> Tensor:
    place = final_place(pieces, used)
    start = torch.where((place == 0)[:, None, None], final, of_last_piece(pieces, used))
    parts = [start - first, final - first, *([] if final_s is None else [final_s])]
    places = place.to(first.dtype)[:, None, None].expand(-1, first.shape[0], 1)
    return by_sequence(pieces, torch.cat([*parts, places], dim=-1))
