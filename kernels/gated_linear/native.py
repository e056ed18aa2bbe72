"""`gated_linear` in C++ (native.cpp), for CPUs: the recurrence itself, with tiles of the state in registers.

Forward and backward are custom ops. The backward pass starts from the states at the starts of blocks of tokens, which
the forward pass keeps, and computes those within a block again. Decoding's single steps have a function of their own.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..common import recurrence
from ..common.recurrence import joined, shares
from ..common.steps import tasks
from ..common.tools import accumulate_dtype, unit_stride
from ..custom import custom_op
from .bonus import with_bonus

# Tokens between the saved states, a multiple of the chunks in native.cpp: the fewer, the more memory they take; the
# more, the less of a block stays in the second-level cache.
BLOCK = 128


def gated_linear_native(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.gated_linear`."""
    if v.shape[1] == 1 and cu_seqlens is None and native.direct(q, k, v, decay, bonus, initial_state):
        return _step(q, k, v, decay, bonus, scale, initial_state)
    return with_bonus(_forward, q, k, v, decay, bonus, scale, initial_state, cu_seqlens)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step, as decoding takes it: one pass over the state, and heads share q and k as they are."""
    (b, _, h, dv), (g, dk) = v.shape, q.shape[2:]
    dtype = accumulate_dtype(v.dtype)
    output, final = v.new_empty(b, 1, h, dv, dtype=dtype), v.new_empty(b, h, dk, dv, dtype=dtype)
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(b, 1, h)
    channels = decay is not None and decay.dim() == 4
    tensors = [
        *(None if x is None else unit_stride(x.to(dtype)) for x in (q, k, v, decay)),
        None if bonus is None else unit_stride(bonus.to(dtype)),
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        output,
        final,
    ]
    numbers = [b, g, h, dk, dv, int(channels), tasks(final), native.bits(scale)]
    native.call("gated_linear", f"gated_linear_step_{native.suffix(dtype)}", tensors, numbers)
    return output.to(v.dtype), final


@custom_op("omnimix::gated_linear_native")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    exclusive: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, final, saved = _outputs(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train)
    result = output if output.dtype == final.dtype else torch.empty_like(output, dtype=final.dtype)
    sequences = final.shape[0]
    parts = recurrence.division(q, v, sequences)
    native.call(
        "gated_linear",
        f"gated_linear_forward_{native.suffix(final.dtype)}",
        [
            *recurrence.views(q, k, v, decay, initial_state, cu_seqlens, BLOCK),
            *(saved if train else None, final, result),
        ],
        [*recurrence.numbers(q, v, decay, sequences, scale, BLOCK, parts), int(exclusive)],
    )
    return result.to(output.dtype), final, saved


@_forward.register_fake
def _outputs(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train):
    return recurrence.outputs(q, v, cu_seqlens, BLOCK, train)


@custom_op("omnimix::gated_linear_native_backward")
def _backward(
    doutput: Tensor,
    dfinal: Tensor | None,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    exclusive: bool,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, wide = recurrence.views(q, k, v, decay, initial_state, cu_seqlens, BLOCK), saved.dtype
    sequences = inputs[-1].shape[0]
    parts = recurrence.division(q, v, sequences)
    _, heads, values = parts
    into_q, into_k, into_v = (shares(n, x, wide) for n, x in ((heads * values, q), (heads * values, k), (1, v)))
    into_decay, into_state = None, None if initial_state is None else shares(1, initial_state, wide)
    if decay_gradient and decay is not None:
        # A decay per head has a share of each sequence too.
        into_decay = shares(values, decay, wide, *[sequences] * (decay.dim() == 1))
    native.call(
        "gated_linear",
        f"gated_linear_backward_{native.suffix(wide)}",
        [
            *(*inputs, saved, None if dfinal is None else dfinal.to(wide).contiguous(), doutput.to(wide).contiguous()),
            *(into_q, into_k, into_v, into_decay, into_state),
        ],
        [*recurrence.numbers(q, v, decay, sequences, scale, BLOCK, parts), int(exclusive)],
    )
    found: Any = ((into_q, q), (into_k, k), (into_v, v), (into_decay, decay), (into_state, initial_state))
    gradients: Any = (v.new_empty(0) if into is None else joined(into, x) for into, x in found)
    return tuple(gradients)


@_backward.register_fake
def _(doutput, dfinal, saved, q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, decay_gradient):
    given = (q, k, v, decay if decay_gradient else None, initial_state)
    return tuple(v.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.exclusive, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)


def _gradients(ctx: Any, doutput: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple:
    saved, *tensors = ctx.saved_tensors
    v, decay_gradient = tensors[2], ctx.needs_input_grad[3]
    if doutput is None:
        doutput = v.new_zeros(v.shape)
    *found, ddecay, dstate = _backward(doutput, dfinal, saved, *tensors, ctx.scale, ctx.exclusive, decay_gradient)
    given = ddecay if decay_gradient else None, None if tensors[4] is None else dstate
    return (*found, *given, None, None, None, None)


_forward.register_gradients(_gradients, _save)
