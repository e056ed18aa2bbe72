"""Mamba-2's step on the kernel for one step of `gated_linear`, which reads the state once and writes it once.

The convolution, whose window is small compared with the state, and the step size are plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.triton_steps import step


def mamba2_step_triton(
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
    filtered = F.silu((after.to(wide) * conv_weight.to(wide)).sum(2) + conv_bias.to(wide)).unsqueeze(1)
    x, b, c = filtered.split([h * dv, groups * dk, groups * dk], dim=2)
    delta = F.softplus(dt.to(wide) + dt_bias.to(wide)).unsqueeze(1)
    x, b, c = x.unflatten(2, (h, dv)), b.unflatten(2, (groups, dk)), c.unflatten(2, (groups, dk))
    decay = -delta * A_log.to(wide).exp()
    y, final = step(c, b, delta.unsqueeze(3) * x, None, None, decay, None, memory.to(wide), 1.0)
    y = torch.addcmul(y, D.to(wide).unsqueeze(1), x)
    return y.flatten(1).to(xbc.dtype), after[:, :, 1:], final
