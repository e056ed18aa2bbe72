"""The bonus's part of the output, which backends without it in their recurrence add in plain torch."""

import torch
from torch import Tensor


def current(q: Tensor, k: Tensor, bonus: Tensor) -> Tensor:
    """The bonus's weight on the current token, (q ⊙ k)ᵀ u per head: `(b, t, h, 1)`."""
    per_group = bonus.unflatten(0, (q.shape[2], -1))
    return torch.einsum("btgk,gjk->btgj", q * k, per_group).flatten(2).unsqueeze(-1)
