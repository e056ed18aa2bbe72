"""The grouped product, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm_reference(*, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `omnimix.kernels.grouped_mm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs, start = [], 0
    for matrix, count in zip(weight, counts.tolist(), strict=True):
        outputs.append(x[start : start + count].to(wide) @ matrix.to(wide))
        start += count
    # Nothing acts on the rows without an expert, and they on nothing.
    outputs.append(x[start:].to(wide) @ torch.zeros_like(weight[0], dtype=wide))
    return torch.cat(outputs).to(x.dtype)
