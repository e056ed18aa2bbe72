"""RMSNorm on torch's fused one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_chunked(
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
    dtype, d = x.dtype, x.shape[-1]
    compute = torch.promote_types(dtype, torch.float32)
    x = x.to(compute)
    if gate is not None:
        gate = gate.to(compute)
        gate = F.silu(gate) if gate_activation == "silu" else torch.sigmoid(gate)
        if not norm_before_gate:
            x = x * gate
    if groups == 1:
        y = F.rms_norm(x, (d,), None if weight is None else weight.to(compute), eps)
    else:
        y = F.rms_norm(x.unflatten(-1, (groups, -1)), (d // groups,), None, eps).flatten(-2)
        y = y if weight is None else y * weight.to(compute)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(dtype)
