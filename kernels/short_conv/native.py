"""The causal depthwise convolution in C++ (native.cpp), for CPUs: one pass over memory forwards, one backwards."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..common.tools import accumulate_dtype, unit_stride
from .ops import Gradients, Outputs, gradient_shapes, register, shapes

# More tasks than threads, so that no thread waits long for the others; but none so small that waking one costs more.
TASKS = 4
SMALLEST = 1 << 16
LANES = 16


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else unit_stride(x.to(dtype))


def short_conv_native(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.short_conv`."""
    if x.shape[1] == 1 and cu_seqlens is None and native.direct(x, weight, bias, initial_state):
        return _step(x, weight, bias, initial_state, activation == "silu")
    return _convolve(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    dtype, (b, _, d) = accumulate_dtype(x.dtype), x.shape
    y, final = x.new_empty(b, 1, d, dtype=dtype), x.new_empty(b, d, weight.shape[1] - 1, dtype=dtype)
    tensors = [
        _wide(x[:, 0], dtype),
        weight.to(dtype).contiguous(),
        _wide(bias, dtype),
        _kept(initial_state, x.dtype, dtype),
        None,
        y[:, 0],
        final,
    ]
    native.call("short_conv", f"short_conv_step_{native.suffix(dtype)}", tensors, [b, d, weight.shape[1], int(silu), 1])
    return y.to(x.dtype), final.to(x.dtype)


def _kept(state: Tensor | None, kept: torch.dtype, dtype: torch.dtype) -> Tensor | None:
    """A state passes through x's dtype, in which it is kept."""
    return None if state is None else state.to(kept).to(dtype).contiguous()


def _inputs(x, weight, bias, initial_state, cu_seqlens, dtype: torch.dtype) -> list[Tensor | None]:
    state = _kept(initial_state, x.dtype, dtype)
    segments = native.segments(x.shape[0], x.shape[1], cu_seqlens, x.shape[1])
    return [_wide(x, dtype), weight.to(dtype).contiguous(), _wide(bias, dtype), state, segments]


def _numbers(x: Tensor, weight: Tensor, sequences: int, silu: bool) -> list[int]:
    """Sizes and options; last the number of parts into which channels are divided among tasks."""
    wanted = min(TASKS * torch.get_num_threads(), x.numel() // SMALLEST)
    parts = max(1, min(-(-wanted // sequences), x.shape[2] // LANES))
    return [sequences, x.shape[2], weight.shape[1], int(silu), parts]


def _forward(x, weight, bias, initial_state, cu_seqlens, silu) -> Outputs:
    dtype = accumulate_dtype(x.dtype)
    y, final = (torch.empty_like(o, dtype=dtype) for o in shapes(x, weight, bias, initial_state, cu_seqlens, silu))
    native.call(
        "short_conv",
        f"short_conv_forward_{native.suffix(dtype)}",
        [*_inputs(x, weight, bias, initial_state, cu_seqlens, dtype), y, final],
        _numbers(x, weight, final.shape[0], silu),
    )
    return y.to(x.dtype), final.to(x.dtype)


def _backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu) -> Gradients:
    dtype, n = accumulate_dtype(x.dtype), dfinal.shape[0]
    dx, dstate = torch.empty_like(dy, dtype=dtype), torch.empty_like(dfinal, dtype=dtype)
    # One share a sequence, summed below: so results do not depend on which thread was first.
    dweight, dbias = (x.new_empty(n, *shape, dtype=dtype) for shape in (weight.shape, weight.shape[:1]))
    native.call(
        "short_conv",
        f"short_conv_backward_{native.suffix(dtype)}",
        [
            *_inputs(x, weight, bias, initial_state, cu_seqlens, dtype),
            *(dy.to(dtype), dfinal.to(dtype).contiguous(), dx, dweight, dbias, dstate),
        ],
        _numbers(x, weight, n, silu),
    )
    empty = gradient_shapes(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)
    found = (dx, dweight.sum(0), dbias.sum(0), dstate)
    gradients: Any = (f.to(e.dtype) for f, e in zip(found, empty, strict=True))
    return tuple(gradients)


_convolve = register("native", _forward, _backward)
