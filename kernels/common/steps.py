"""What the native kernels of single steps share: for which calls they are, and how one is divided among threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..native import direct_limits
from ..registry import Arguments

# Elements of the state for which it is worth waking a thread.
SMALLEST = 1 << 15


def one_step(sequence: str) -> Callable[[Arguments], str | None]:
    """The `limits` of a native backend for single steps, as decoding takes them.

    Args:
        sequence: the name of an argument whose dimension 1 is time.
    """

    def limits(arguments: Arguments) -> str | None:
        if arguments[sequence].shape[1] != 1:
            # Without the number: to write it down, torch.compile would fix the length.
            return "it takes one step at a time, and there are several"
        if arguments["cu_seqlens"] is not None:
            return "it takes no packed sequences"
        return direct_limits(arguments.values())

    return limits


def tasks(state: Tensor) -> int:
    """Parts into which a step over this state is divided."""
    return max(1, min(torch.get_num_threads(), state.numel() // SMALLEST))
