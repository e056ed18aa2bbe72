"""The long convolution, as its sum is written."""

from __future__ import annotations

import torch
from torch import Tensor


def long_conv_reference(
    *,
    u: Tensor,
    filters: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.long_conv`; a window of the last l inputs slides along and meets the filter's mirror."""
    compute = torch.promote_types(u.dtype, torch.float32)
    b, _, d = u.shape
    length = filters.shape[1]
    sequences = list(u.split(1)) if cu_seqlens is None else list(u.split(cu_seqlens.diff().tolist(), dim=1))
    if initial_state is None:
        initial_state = u.new_zeros(len(sequences), d, length - 1)
    # Cast once: gradients of a cast at each step would be summed in the low precision.
    mirrored = filters.to(compute).repeat_interleave(d // filters.shape[0], dim=0).flip(1)
    skip = None if skip is None else skip.to(compute)
    outputs, states = [], []
    for sequence, state in zip(sequences, initial_state.to(compute), strict=True):
        steps = sequence[0].to(compute)
        rows = torch.cat([state, steps.t()], dim=1)
        for i, u_t in enumerate(steps):
            y_t = (mirrored * rows[:, i : i + length]).sum(1)
            outputs.append(y_t if skip is None else y_t + skip * u_t)
        states.append(rows[:, rows.shape[1] - (length - 1) :])
    return torch.stack(outputs).view(b, -1, d).to(u.dtype), torch.stack(states).to(u.dtype)
