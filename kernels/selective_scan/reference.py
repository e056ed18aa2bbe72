"""The definition of `selective_scan`: the recurrence, one step at a time (Mamba, arXiv 2312.00752, algorithm 2).

Δ, B and C vary with the step; the state is discretised exactly and the input by Euler's rule, as in the paper's
published kernel.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    *,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.selective_scan`."""
    b, t, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    u, step, decay = x.to(wide), delta.to(wide), A.to(wide)
    # One row of weights for each channel: (b, t, d, n).
    into, out = (w.to(wide).repeat_interleave(d // w.shape[2], dim=2) for w in (B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(wide)
    if delta_softplus:
        step = F.softplus(step)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_state is None:
            state = u.new_zeros(b, d, A.shape[1])
        else:
            state = (initial_state if cu_seqlens is None else initial_state[i : i + 1]).to(wide)
        for s in range(start, stop):
            now = step[:, s, :, None]
            state = torch.exp(now * decay) * state + now * into[:, s] * u[:, s, :, None]
            outputs.append((out[:, s] * state).sum(-1))
        states.append(state)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), states[0] if len(states) == 1 else torch.cat(states)
