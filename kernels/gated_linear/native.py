"""One step of the recurrence in C++ (native.cpp), as decoding takes it on CPUs."""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..common.steps import tasks
from ..common.tools import accumulate_dtype, unit_stride


def gated_linear_native(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.gated_linear`; t = 1. One pass over the state, and heads share q and k as they are."""
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
