"""The definition of `delta_rule`: the recurrence, one step at a time.

DeltaNet: arXiv 2406.06484, eq. 2. Gated DeltaNet: arXiv 2412.06464, eq. 10. KDA: Kimi Linear, arXiv 2510.26692, eq. 1.
Comba: arXiv 2506.02475. RWKV-7: arXiv 2503.14456, eq. 16-17; e^decay is its w, b its κ̂, a its -κ̂ ⊙ a. States here are
`(k, v)`; the papers of Gated DeltaNet, Comba and RWKV-7 write them transposed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def delta_rule_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    removal: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, t, h, dv = v.shape
    dk, dtype = q.shape[-1], v.dtype
    wide = torch.promote_types(dtype, torch.float32)

    def per_head(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(h // x.shape[2], dim=2)

    q, k, v = per_head(q), per_head(k), v.to(wide)
    # (batch, t, h, 1 or k), whatever the decay came as.
    retain = v.new_ones(1) if decay is None else decay.to(wide).exp()
    retain = (retain if retain.dim() == 4 else retain.unsqueeze(-1)).expand(batch, t, h, -1)
    if a is None or b is None:
        # What is removed is read from the decayed state: k̃ᵀ diag(e^g) S.
        b = (k if removal is None else per_head(removal)) * retain
        beta = v.new_ones(1, 1, 1) if beta is None else beta.to(wide)
        a, k = -k * beta.unsqueeze(-1), k * beta.unsqueeze(-1)
    else:
        a, b = per_head(a), per_head(b)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_state is None:
            state = v.new_zeros(batch, h, dk, dv)
        else:
            state = (initial_state if cu_seqlens is None else initial_state[i : i + 1]).to(wide)
        for s in range(start, stop):
            state = delta_rule_step(state, retain[:, s], a[:, s], b[:, s], k[:, s], v[:, s])
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, s], state))
        states.append(state)
    # Not joined where there is one only: a step of decoding would copy its state once more.
    state = states[0] if len(states) == 1 else torch.cat(states)
    return (torch.stack(outputs, dim=1) * scale).to(dtype), state


def delta_rule_step(state: Tensor, retain: Tensor, a: Tensor, b: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diag(retain) S + a (bᵀ S) + k vᵀ.

    Args:
        state: S, `(batch, h, k, v)`.
        retain: e^decay, `(batch, h, 1)` or `(batch, h, k)`.
        a, b, k: `(batch, h, k)`.
        v: `(batch, h, v)`.
    """
    read = torch.einsum("bhk,bhkv->bhv", b, state)
    state = torch.addcmul(k.unsqueeze(-1) * v.unsqueeze(-2), state, retain.unsqueeze(-1))
    return torch.addcmul(state, a.unsqueeze(-1), read.unsqueeze(-2))
