"""RMSNorm as written in the paper."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_reference(
    *,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
    norm_before_gate: bool,
    groups: int,
    eps: float,
) -> Tensor:
    """See `omnimix.kernels.norm`."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if gate is None:
        factor = torch.ones_like(y)
    else:
        z = gate.to(y.dtype)
        factor = torch.sigmoid(z) * z if gate_activation == "silu" else torch.sigmoid(z)
    if not norm_before_gate:
        y = y * factor
    slices = y.unflatten(-1, (groups, -1))
    y = (slices / torch.sqrt(slices.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if norm_before_gate:
        y = y * factor
    return y.to(x.dtype)
