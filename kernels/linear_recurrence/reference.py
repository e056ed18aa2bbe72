"""The definition of `linear_recurrence`: h_t = a_t ⊙ h_{t-1} + x_t, one step at a time.

LRU: arXiv 2303.06349, eq. 1 with a diagonal state. RG-LRU: arXiv 2402.19427, eq. 4. HGRN: arXiv 2311.04823, eq. 5.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def linear_recurrence_reference(
    *,
    x: Tensor,
    a: Tensor,
    reverse: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.linear_recurrence`."""
    b, t, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    u, factor = x.to(wide), a.to(wide).expand(b, t, d)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_state is None:
            state = u.new_zeros(b, d)
        else:
            state = (initial_state if cu_seqlens is None else initial_state[i : i + 1]).to(wide)
        rows = []
        for s in range(stop - 1, start - 1, -1) if reverse else range(start, stop):
            state = factor[:, s] * state + u[:, s]
            rows.append(state)
        outputs += reversed(rows) if reverse else rows
        states.append(state)
    return torch.stack(outputs, dim=1).to(x.dtype), states[0] if len(states) == 1 else torch.cat(states)
