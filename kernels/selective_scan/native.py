"""`selective_scan` in C++ (native.cpp), for CPUs: states in vector registers, no tensor of the size of all states."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..common.tools import accumulate_dtype, unit_stride
from .ops import Gradients, Outputs, gradient_shapes, register, shapes

# Steps between the saved states: what a backward task computes again then stays in the second-level cache.
CHUNK = 32
# More tasks than threads, so that no thread waits long for the others; but none so small that waking one costs more.
TASKS = 4
SMALLEST = 2**16


def _wide(arguments: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """Arguments of neighbouring elements and one dtype, which is all that the C++ code reads."""
    return [None if a is None else unit_stride(a.to(dtype)) for a in arguments]


def _numbers(x: Tensor, A: Tensor, B: Tensor, sequences: int, softplus: bool) -> list[int]:
    """Sizes and options; last the number of parts into which channels are divided among tasks."""
    lanes = 64 // accumulate_dtype(x.dtype).itemsize
    work = x.shape[0] * x.shape[1] * x.shape[2] * A.shape[1]
    most = min(TASKS * torch.get_num_threads(), work // SMALLEST)
    parts = min(max(1, x.shape[2] // lanes), max(1, -(-most // sequences)))
    return [sequences, x.shape[1], x.shape[2], A.shape[1], B.shape[2], CHUNK, int(softplus), parts]


def _forward(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus) -> Outputs:
    y, final, borders = shapes(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus, CHUNK)
    tensors = _wide((x, delta, A, B, C, D, z, bias, initial_state), final.dtype)
    segments = native.segments(x.shape[0], x.shape[1], cu_seqlens, CHUNK)
    result = y if y.dtype == final.dtype else torch.empty_like(y, dtype=final.dtype)
    native.call(
        "selective_scan",
        f"selective_scan_forward_{native.suffix(final.dtype)}",
        [*tensors, segments, result, final, borders],
        _numbers(x, A, B, final.shape[0], softplus),
    )
    return result.to(y.dtype), final, borders


def _backward(dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus) -> Gradients:
    arguments = (x, delta, A, B, C, D, z, bias, initial_state)
    wide, sequences = borders.dtype, dfinal.shape[0]
    tensors = _wide(arguments, wide)
    numbers = _numbers(x, A, B, sequences, softplus)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=wide)

    dx, ddelta = empty(*x.shape), empty(*x.shape)
    dz = empty(*x.shape) if z is not None else None
    # One share a sequence or a part, summed below: so results do not depend on which thread was first.
    dA, dD, dbias = empty(sequences, *A.shape), empty(sequences, x.shape[2]), empty(sequences, x.shape[2])
    dB, dC = (x.new_zeros(numbers[-1], *B.shape, dtype=wide) for _ in range(2))
    dstate = empty(*dfinal.shape)
    native.call(
        "selective_scan",
        f"selective_scan_backward_{native.suffix(wide)}",
        [
            *tensors,
            native.segments(x.shape[0], x.shape[1], cu_seqlens, CHUNK),
            *(None, None, borders),
            *_wide((dy, dfinal), wide),
            *(dx, ddelta, dA, dB, dC, dD, dz, dbias, dstate),
        ],
        numbers,
    )
    found: Any = (dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dstate)
    empties = gradient_shapes(dy, dfinal, borders, *arguments)
    gradients: Any = (e if a is None else f.to(a.dtype) for f, a, e in zip(found, arguments, empties, strict=True))
    return tuple(gradients)


_scan = register("native", CHUNK, _forward, _backward)


def selective_scan_native(
    *,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.selective_scan`."""
    tensors = (x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    run = _forward if native.direct(*tensors) else _scan
    y, final, _ = run(*tensors, delta_softplus)
    return y, final
