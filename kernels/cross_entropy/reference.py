"""The loss from all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_reference(
    *,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """See `omnimix.kernels.cross_entropy`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    valid = target != ignore_index
    if z_loss:
        losses = losses + torch.where(valid, z_loss * logits.logsumexp(-1).square(), 0)
    if reduction == "none":
        return losses
    return losses.sum() / valid.sum().clamp_min(1) if reduction == "mean" else losses.sum()
