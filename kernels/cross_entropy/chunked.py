"""The loss of a chunk in plain torch."""

import torch
from torch import Tensor

from .passes import Terms, backend_of


def _softmax(
    logits: Tensor, target: Tensor, upstream: Tensor, terms: Terms, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """See `passes.Softmax`."""
    slope = None
    if terms.softcap:
        logits.div_(terms.softcap).tanh_()
        slope = 1 - logits.square() if dtype is not None else None
        logits.mul_(terms.softcap)
    # torch's fused kernel goes over the logits while they are in the cache; the normaliser follows from any entry.
    log = torch.log_softmax(logits, dim=1)
    at = torch.where(target == terms.ignore_index, 0, target)[:, None]
    hit = log.gather(1, at)
    normaliser = logits.gather(1, at) - hit
    losses = -(1 - terms.smoothing) * hit[:, 0]
    if terms.z_loss:
        # A square that overflows is no number where it is multiplied by zero.
        losses += terms.z_loss * normaliser[:, 0].square()
    if terms.smoothing:
        losses -= terms.smoothing * log.mean(1)
    if dtype is None:
        return losses, None
    upstream = upstream[:, None]
    g = log.exp_().mul_(upstream * (1 + 2 * terms.z_loss * normaliser))
    if terms.smoothing:
        g -= upstream * (terms.smoothing / logits.shape[1])
    g.scatter_add_(1, at, -(1 - terms.smoothing) * upstream)
    if slope is not None:
        g *= slope
    return losses, g.to(dtype)


cross_entropy_chunked = backend_of("chunked", _softmax)
