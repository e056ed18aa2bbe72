"""Mamba-2's step, one head after the other (arXiv 2405.21060, with the short convolution before it)."""

from __future__ import annotations

import torch
from torch import Tensor


def mamba2_step_reference(
    *,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    window: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `omnimix.kernels.mamba2_step`."""
    wide = torch.promote_types(xbc.dtype, torch.float32)
    h, dk, dv = memory.shape[1:]
    shared = (xbc.shape[1] - h * dv) // 2
    inputs = torch.cat([window.to(xbc.dtype), xbc[:, :, None]], dim=2)
    z = torch.einsum("bcw,cw->bc", inputs.to(wide), conv_weight.to(wide)) + conv_bias.to(wide)
    x, b, c = (z * torch.sigmoid(z)).split([h * dv, shared, shared], dim=1)
    delta = torch.log1p(torch.exp(dt.to(wide) + dt_bias.to(wide)))
    outputs, states = [], []
    for head in range(h):
        group = head // (h // (shared // dk))
        own, into, out = x[:, head * dv : (head + 1) * dv], *(s[:, group * dk : (group + 1) * dk] for s in (b, c))
        step = delta[:, head, None]
        retain = torch.exp(-step * torch.exp(A_log[head].to(wide)))
        state = retain[:, :, None] * memory[:, head].to(wide) + torch.einsum("bk,bv->bkv", into, step * own)
        outputs.append(torch.einsum("bkv,bk->bv", state, out) + D[head].to(wide) * own)
        states.append(state)
    return torch.cat(outputs, dim=1).to(xbc.dtype), inputs[:, :, 1:], torch.stack(states, dim=1)
