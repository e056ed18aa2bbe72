"""Mamba-2's step in plain torch, on any device; heads that share B and C are broadcast over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mamba2_step_chunked(
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
    (_, h, dk, dv), after = memory.shape, torch.cat([window.to(xbc.dtype), xbc.unsqueeze(2)], dim=2)
    groups = (xbc.shape[1] - h * dv) // (2 * dk)
    filtered = F.silu((after.to(wide) * conv_weight.to(wide)).sum(2) + conv_bias.to(wide))
    x, b, c = filtered.split([h * dv, groups * dk, groups * dk], dim=1)
    step = F.softplus(dt.to(wide) + dt_bias.to(wide)).unsqueeze(2)
    retain = torch.exp(-step * A_log.to(wide).exp().unsqueeze(1))
    x = x.unflatten(1, (h, dv))
    # (b, h, ...) -> (b, g, h / g, ...)
    memory, retain, value = (a.unflatten(1, (groups, -1)) for a in (memory.to(wide), retain, step * x))
    b, c = (a.unflatten(1, (groups, 1, dk)) for a in (b, c))
    write = b.unsqueeze(-1) * value.unsqueeze(-2)
    final = torch.addcmul(write, memory, retain.unsqueeze(-1))
    y = (c.unsqueeze(-2) @ final).squeeze(-2).flatten(1, 2)
    y = torch.addcmul(y, D.to(wide).unsqueeze(1), x)
    return y.flatten(1).to(xbc.dtype), after[:, :, 1:], final.flatten(1, 2)
