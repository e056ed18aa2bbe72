"""How the native kernels of single steps are divided among threads."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the state for which it is worth waking a thread.
SMALLEST = 1 << 15


def tasks(state: Tensor) -> int:
    """Parts into which a step over this state is divided."""
    return max(1, min(torch.get_num_threads(), state.numel() // SMALLEST))
