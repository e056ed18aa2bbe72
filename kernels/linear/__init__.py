"""torch's linear layer, and for the few rows of a decoding step a product that reads the weights as fast as memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import native

# Up to so many rows the time is that of reading the weights, and torch's matrix product takes longer.
ROWS = 4
DTYPES = frozenset({torch.float32, torch.float64})
# Weights for which it is worth waking a thread.
SMALLEST = 1 << 16


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, o] | None = None
) -> Float[Tensor, "*rows o"]:
    """y = x Wᵀ + b, as torch.nn.functional.linear.

    On CPUs a product with few rows takes the time in which its weights are read, and BLAS takes twice that. Where no
    gradient is asked for, up to ROWS rows of float32 or float64 therefore run in C++ (native.cpp); all else is torch's.

    Raises:
        RuntimeError: shapes that do not fit, as torch says it.
    """
    if not _few(x, weight, bias) or not native.direct("linear", x, weight, bias):
        return F.linear(x, weight, bias)
    outputs, width = weight.shape
    inputs = x.reshape(-1, width)
    y = x.new_empty(*x.shape[:-1], outputs)
    count = inputs.shape[0]
    tasks = max(1, min(torch.get_num_threads(), weight.numel() // SMALLEST))
    tensors = [inputs, weight, bias, y.view(count, outputs)]
    native.call("linear", f"linear_{native.suffix(x.dtype)}", tensors, [count, outputs, width, tasks])
    return y


def _few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether native.cpp serves these."""
    fits = weight.ndim == 2 and x.shape[-1] == weight.shape[1] and 0 < x.numel() <= ROWS * x.shape[-1]
    if not fits or x.dtype not in DTYPES or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return all(a.dtype == x.dtype and a.layout is torch.strided and a.stride(-1) == 1 for a in tensors)
