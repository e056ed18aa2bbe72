"""Mamba-2's step in C++ (native.cpp)."""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..common.steps import tasks
from ..common.tools import unit_stride


def mamba2_step_native(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `omnimix.kernels.mamba2_step`."""
    b, h, dk, dv = memory.shape
    y, after, final = xbc.new_empty(b, h * dv), window.new_empty(window.shape), memory.new_empty(memory.shape)
    numbers = [b, (xbc.shape[1] - h * dv) // (2 * dk), h, dk, dv, conv_weight.shape[1], tasks(memory)]
    kept = (x.contiguous() for x in (conv_weight, conv_bias, dt_bias, A_log, D, window, memory))
    tensors = [unit_stride(xbc), unit_stride(dt), *kept, y.view(b, h, dv), after, final]
    native.call("mamba2_step", f"mamba2_step_{native.suffix(xbc.dtype)}", tensors, numbers)
    return y, after, final
