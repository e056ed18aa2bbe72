"""The causal depthwise convolution, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv_reference(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.short_conv`; the window slides over the inputs and is the state."""
    compute = torch.promote_types(x.dtype, torch.float32)
    b, _, d = x.shape
    width = weight.shape[1]
    if cu_seqlens is None:
        sequences = list(x.split(1))
    else:
        sequences = list(x.split(cu_seqlens.diff().tolist(), dim=1))
    if initial_state is None:
        initial_state = x.new_zeros(len(sequences), d, width - 1)
    # Cast once: gradients of a cast at each step would be summed in the low precision.
    weight, bias = weight.to(compute), None if bias is None else bias.to(compute)
    outputs, states = [], []
    for sequence, state in zip(sequences, initial_state.to(compute), strict=True):
        for x_t in sequence[0].to(compute):
            window = torch.cat([state, x_t[:, None]], dim=1)
            y_t = (weight * window).sum(1)
            if bias is not None:
                y_t = y_t + bias
            outputs.append(y_t * torch.sigmoid(y_t) if activation == "silu" else y_t)
            state = window[:, 1:]
        states.append(state)
    return torch.stack(outputs).view(b, -1, d).to(x.dtype), torch.stack(states).to(x.dtype)
