"""The linear layer as its sum is written."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `omnimix.kernels.linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.einsum("...i,oi->...o", x.to(wide), weight.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
