"""A few rows times a matrix in C++ (native.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

# Weights for which it is worth waking a thread.
SMALLEST = 1 << 16


def linear_native(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `omnimix.kernels.linear`."""
    outputs, width = weight.shape
    inputs = x.reshape(-1, width)
    y = x.new_empty(*x.shape[:-1], outputs)
    count = inputs.shape[0]
    tasks = max(1, min(torch.get_num_threads(), weight.numel() // SMALLEST))
    tensors = [inputs, weight, bias, y.view(count, outputs)]
    native.call("linear", f"linear_{native.suffix(x.dtype)}", tensors, [count, outputs, width, tasks])
    return y
