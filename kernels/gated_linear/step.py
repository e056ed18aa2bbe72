"""One step of the recurrence, as decoding takes it: in C++ (native.cpp) where it may be called at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..tools import accumulate_dtype, unit_stride
from .reference import gated_linear_reference

# Elements of the state for which it is worth waking a thread.
SMALLEST = 1 << 15


def tasks(state: Tensor) -> int:
    """Parts into which a step over this state is divided."""
    return max(1, min(torch.get_num_threads(), state.numel() // SMALLEST))


def gated_linear_step(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_linear` for t = 1, without packed sequences.

    The definition takes four passes over the state and gives every head its own copy of q and k.
    """
    if not native.direct("gated_linear", q, k, v, decay, bonus, initial_state):
        return gated_linear_reference(
            q=q,
            k=k,
            v=v,
            decay=decay,
            bonus=bonus,
            scale=scale,
            initial_state=initial_state,
            cu_seqlens=None,
        )
    (b, _, h, dv), (g, dk) = v.shape, q.shape[2:]
    dtype = accumulate_dtype(v.dtype)
    output, final = v.new_empty(b, 1, h, dv, dtype=dtype), v.new_empty(b, h, dk, dv, dtype=dtype)
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(b, 1, h)
    channels = decay is not None and decay.dim() == 4
    tensors = [
        *(None if x is None else unit_stride(x[:, 0].to(dtype)) for x in (q, k, v, decay)),
        None if bonus is None else unit_stride(bonus.to(dtype)),
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        output[:, 0],
        final,
    ]
    numbers = [b, g, h, dk, dv, int(channels), tasks(final), native.bits(scale)]
    native.call("gated_linear", f"gated_linear_step_{native.suffix(dtype)}", tensors, numbers)
    return output.to(v.dtype), final
