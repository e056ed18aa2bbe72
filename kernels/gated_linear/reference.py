"""The definition of `gated_linear`: the recurrence, one step at a time.

Linear attention: arXiv 2006.16236, eq. 18-20, without the normaliser. RetNet: arXiv 2307.08621, the recurrent form.
GLA: arXiv 2312.06635, the recurrent form. Mamba-2: arXiv 2405.21060, the scalar-identity SSM, with B for k and C for q.
RWKV-6: arXiv 2404.05892, eq. 19.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def gated_linear_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, t, h, dv = v.shape
    dk, dtype = q.shape[-1], v.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (x.to(wide).repeat_interleave(h // x.shape[2], dim=2) for x in (q, k))
    v = v.to(wide)
    # (b, t, h, 1 or k), whatever the decay came as.
    retain = v.new_ones(1) if decay is None else decay.to(wide).exp()
    retain = (retain if retain.dim() == 4 else retain.unsqueeze(-1)).expand(b, t, h, -1)
    bonus = None if bonus is None else bonus.to(wide)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_state is None:
            state = v.new_zeros(b, h, dk, dv)
        else:
            state = (initial_state if cu_seqlens is None else initial_state[i : i + 1]).to(wide)
        for s in range(start, stop):
            output, state = gated_linear_step(q[:, s], k[:, s], v[:, s], retain[:, s], bonus, state)
            outputs.append(output)
        states.append(state)
    # Not joined where there is one only: a step of decoding would copy its state once more.
    state = states[0] if len(states) == 1 else torch.cat(states)
    return (torch.stack(outputs, dim=1) * scale).to(dtype), state


def gated_linear_step(
    q: Tensor, k: Tensor, v: Tensor, retain: Tensor, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step.

    Args:
        q, k: `(b, h, k)`.
        v: `(b, h, v)`.
        retain: e^decay, `(b, h, 1)` or `(b, h, k)`.
        bonus: `(h, k)` or None.
        state: `(b, h, k, v)`.

    Returns:
        The output `(b, h, v)`, not yet scaled, and the next state.
    """
    write = k.unsqueeze(-1) * v.unsqueeze(-2)
    after = torch.addcmul(write, state, retain.unsqueeze(-1))
    read = after if bonus is None else torch.addcmul(state, write, bonus.unsqueeze(-1))
    return torch.einsum("bhk,bhkv->bhv", q, read), after
