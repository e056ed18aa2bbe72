"""The bonus of `gated_linear`, which backends without it in their recurrence add in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.tools import accumulate_dtype


def with_bonus(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence that knows no bonus, and add the bonus's part to its output.

    Args:
        forward: `(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train)` gives the output, the final
            state and what is kept for the backward pass, which is only needed where `train` is set. An exclusive
            output reads the state before the token's own update, as the bonus asks for.
        q, k, v, decay, bonus, scale, initial_state, cu_seqlens: see `omnimix.kernels.gated_linear`.
    """
    dtype = v.dtype
    if bonus is not None:
        # Two paths lead to q, k and v: their gradients are to be added before they are rounded.
        q, k, v, bonus = (x.to(accumulate_dtype(dtype)) for x in (q, k, v, bonus))
    inputs = (q, k, v, decay, initial_state)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, state, _ = forward(q, k, v, decay, initial_state, cu_seqlens, scale, bonus is not None, train)
    if bonus is not None:
        output = output + scale * _current(q, k, bonus) * v
    return output.to(dtype), state


def _current(q: Tensor, k: Tensor, bonus: Tensor) -> Tensor:
    """The bonus's weight on the current token, (q ⊙ k)ᵀ u per head: `(b, t, h, 1)`."""
    per_group = bonus.unflatten(0, (q.shape[2], -1))
    return torch.einsum("btgk,gjk->btgj", q * k, per_group).flatten(2).unsqueeze(-1)
