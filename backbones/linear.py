"""What is done with the weights of linear layers, where the layer is torch's own; other layers are called.

Adapters, quantised layers and hooks stand in a layer's place, so that a weight is never read past its module unless
a call of it would read the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..utils.private_torch import untouched


def apply_wide(layer: nn.Module, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
    """Call a linear layer in the dtype of `x`, which may be wider than its weights; for what rounding would harm."""
    if untouched(layer):
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    # What stands in its place computes in the dtype of its own parameters; quantised layers have none.
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
    return layer(x.to(dtype)).to(x.dtype)


def without_bias(
    layer: nn.Module, x: Float[Tensor, "*rows i"]
) -> tuple[Float[Tensor, "*rows o"], Float[Tensor, " o"] | None]:
    """x Wᵀ and the bias, for a kernel that adds it without rounding; x Wᵀ + b and None where the layer is touched."""
    return (F.linear(x, layer.weight), layer.bias) if untouched(layer) else (layer(x), None)
