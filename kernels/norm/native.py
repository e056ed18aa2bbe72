"""RMSNorm in C++ (native.cpp), for CPUs: one pass over memory forwards, one backwards."""

import torch
from torch import Tensor

from .. import native
from ..common.tools import accumulate_dtype, unit_stride
from ..custom import custom_op

# More tasks than threads, so that no thread waits long for the others; but none so small that waking one costs more.
TASKS = 4
SMALLEST = 1 << 16


def norm_native(
    *,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
    norm_before_gate: bool,
    groups: int,
    eps: float,
) -> Tensor:
    """See `omnimix.kernels.norm`."""
    run = _run if native.direct(x, weight, gate) else _forward
    return run(x, weight, gate, gate_activation == "silu", norm_before_gate, groups, eps)


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else unit_stride(x.to(dtype).reshape(-1, x.shape[-1]))


def _numbers(x: Tensor, groups: int, silu: bool, before: bool, eps: float) -> list[int]:
    d = x.shape[-1]
    rows = x.numel() // d
    tasks = max(1, min(TASKS * torch.get_num_threads(), rows, x.numel() // SMALLEST))
    return [rows, groups, d // groups, int(silu), int(before), native.bits(eps), tasks]


def _run(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, before: bool, groups: int, eps: float
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    inputs = [_rows(x, dtype), None if weight is None else weight.to(dtype).contiguous(), _rows(gate, dtype)]
    native.call(
        "norm",
        f"norm_forward_{native.suffix(dtype)}",
        [*inputs, y.view(-1, x.shape[-1])],
        _numbers(x, groups, silu, before, eps),
    )
    return y.to(x.dtype)


@custom_op("omnimix::norm_native")
def _forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, before: bool, groups: int, eps: float
) -> Tensor:
    return _run(x, weight, gate, silu, before, groups, eps)


@_forward.register_fake
def _(x, weight, gate, silu, before, groups, eps):
    return x.new_empty(x.shape)


@custom_op("omnimix::norm_native_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    silu: bool,
    before: bool,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, d = accumulate_dtype(x.dtype), x.shape[-1]
    numbers = _numbers(x, groups, silu, before, eps)
    dx = x.new_empty(x.shape, dtype=dtype)
    dgate = None if gate is None else torch.empty_like(dx)
    # One share a task, summed below: so results do not depend on which thread was first.
    dweight = None if weight is None else x.new_zeros(numbers[-1], d, dtype=dtype)
    inputs = [_rows(x, dtype), None if weight is None else weight.to(dtype).contiguous(), _rows(gate, dtype)]
    native.call(
        "norm",
        f"norm_backward_{native.suffix(dtype)}",
        [
            *inputs,
            _rows(dy, dtype),
            dx.view(-1, d),
            dweight,
            None if dgate is None else dgate.view(-1, d),
        ],
        numbers,
    )
    shapes = _gradient_shapes(dy, x, weight, gate, silu, before, groups, eps)
    return (
        dx.to(x.dtype),
        shapes[1] if dweight is None or weight is None else dweight.sum(0).to(weight.dtype),
        shapes[2] if dgate is None or gate is None else dgate.to(gate.dtype),
    )


@_backward.register_fake
def _gradient_shapes(dy, x, weight, gate, silu, before, groups, eps):
    """Empty tensors for the gradients; of no elements where there is no such argument."""
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _save(ctx, inputs, output) -> None:
    x, weight, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, gate)


def _differentiate(ctx, dy):
    x, weight, gate = ctx.saved_tensors
    dx, dweight, dgate = _backward(dy, x, weight, gate, *ctx.options)
    return dx, None if weight is None else dweight, None if gate is None else dgate, None, None, None, None


_forward.register_gradients(_differentiate, _save)
