"""`linear_recurrence` in C++ (native.cpp), for CPUs: one pass over memory, complex numbers as pairs of real ones."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..common.tools import unit_stride
from .ops import gradient_shapes, register, shapes

# More tasks than threads, so that no thread waits long for the others; but none narrower than a few vectors, or so
# small that waking a thread costs more.
TASKS = 4
NARROWEST = 64
SMALLEST = 2**16


def _reals(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the dtype of states, complex numbers as neighbouring pairs: the last dimension is twice as long."""
    if x is None:
        return None
    x = unit_stride(x if x.dtype == dtype else x.to(dtype))
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _run(direction: str, tensors: list[Tensor | None], x: Tensor, sequences: int, reverse: bool) -> None:
    width = x.shape[2] * (2 if x.is_complex() else 1)
    most = min(TASKS * torch.get_num_threads(), x.shape[0] * x.shape[1] * width // SMALLEST)
    parts = min(max(1, width // NARROWEST), max(1, -(-most // sequences)))
    real = next(t for t in tensors if t is not None).dtype
    native.call(
        "linear_recurrence",
        f"linear_recurrence_{direction}_{native.suffix(real)}",
        tensors,
        [sequences, width, parts, int(reverse), int(x.is_complex())],
    )


def _forward(x, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor]:
    h, final = shapes(x, a, initial_state, cu_seqlens, reverse)
    wide = final.dtype
    result = h if h.dtype == wide else torch.empty_like(h, dtype=wide)
    inputs = (x, a.expand(x.shape) if a.dim() == 1 else a, initial_state)
    segments = native.segments(x.shape[0], x.shape[1], cu_seqlens, 1)
    tensors = [*(_reals(i, wide) for i in inputs), segments, *(_reals(o, wide) for o in (result, final))]
    _run("forward", tensors, x, final.shape[0], reverse)
    return result if result is h else result.to(h.dtype), final


def _backward(dh, dfinal, h, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor, Tensor]:
    wide, sequences = dfinal.dtype, dfinal.shape[0]
    constant = a.dim() == 1
    dx, dstate = torch.empty_like(h, dtype=wide), torch.empty_like(dfinal)
    # A constant factor's gradient is a sum over time: one share a sequence.
    da = h.new_empty(sequences, *a.shape, dtype=wide) if constant else torch.empty_like(dx)
    segments = native.segments(h.shape[0], h.shape[1], cu_seqlens, 1)
    inputs = [_reals(i, wide) for i in (a.expand(h.shape), initial_state, h, dh, dfinal)]
    outputs = [_reals(o, wide) for o in (dx, None if constant else da, dstate, da if constant else None)]
    tensors = [None, *inputs[:2], segments, inputs[2], None, *inputs[3:], *outputs]
    _run("backward", tensors, h, sequences, reverse)
    if initial_state is None:
        _, _, dstate = gradient_shapes(dh, dfinal, h, a, initial_state, cu_seqlens, reverse)
    else:
        dstate = dstate.to(initial_state.dtype)
    return dx.to(h.dtype), (da.sum(0) if constant else da).to(a.dtype), dstate


_scan = register("native", _forward, _backward)


def linear_recurrence_native(
    *, x: Tensor, a: Tensor, reverse: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.linear_recurrence`."""
    if native.direct(x, a, initial_state, cu_seqlens):
        if x.is_complex() or a.is_complex():
            resolved: Any = (None if t is None else t.resolve_conj() for t in (x, a, initial_state))
            x, a, initial_state = resolved
        return _forward(x, a, initial_state, cu_seqlens, reverse)
    return _scan(x=x, a=a, reverse=reverse, initial_state=initial_state, cu_seqlens=cu_seqlens)
