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


def mamba2_step(
    *,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    window: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A decoding step of Mamba-2 between its projections, in one call; None where it must go through the ops.

    Apart from each other, the convolution, the step size, the recurrence and the skip are a dozen calls, most of which
    take longer than their work.

    Args:
        xbc: `(b, 1, h v + 2 g k)`, x, B and C before the convolution.
        dt: `(b, 1, h)`.
        conv_weight, conv_bias: `(h v + 2 g k, w)` and `(h v + 2 g k,)`.
        dt_bias, A_log, D: `(h,)`.
        window: the convolution's state.
        memory: the recurrence's, `(b, h, k, v)`.

    Returns:
        y `(b, 1, h v)`, and the next window and memory.
    """
    tensors = (xbc, dt, conv_weight, conv_bias, dt_bias, A_log, D, window, memory)
    same = xbc.dtype in (torch.float32, torch.float64) and all(x.dtype == xbc.dtype for x in tensors)
    if xbc.shape[1] != 1 or not same or not native.direct("gated_linear", *tensors):
        return None
    b, h, dk, dv = memory.shape
    if window.shape[0] != b or xbc.shape[0] != b:
        return None
    y, after, final = xbc.new_empty(b, 1, h * dv), window.new_empty(window.shape), memory.new_empty(memory.shape)
    numbers = [b, (xbc.shape[2] - h * dv) // (2 * dk), h, dk, dv, conv_weight.shape[1], tasks(memory)]
    rows = [xbc[:, 0], dt[:, 0], *(x.contiguous() for x in tensors[2:]), y.view(b, h, dv), after, final]
    native.call("gated_linear", f"mamba2_step_{native.suffix(xbc.dtype)}", rows, numbers)
    return y, after, final
