"""`delta_rule` in C++ (native.cpp), for CPUs: the recurrence itself, with columns of the state in the cache.

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

# Tokens between the saved states, a multiple of the chunks in native.cpp: the fewer, the more memory they take; the
# more, the less of a block's states stays in the second-level cache.
BLOCK = 64
# Views of gradients in recurrence.h, which a forward pass has none of.
GRADIENTS = 5


def delta_rule_native(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    removal: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.delta_rule`."""
    tensors = (q, k, v, beta, decay, removal, a, b)
    if v.shape[1] == 1 and cu_seqlens is None and native.direct(*tensors, initial_state):
        return _step(tensors, scale, initial_state)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, initial_state))
    output, state, _ = _forward(*tensors, initial_state, cu_seqlens, scale, train)
    return output, state


def _step(tensors: tuple[Any, ...], scale: float, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step, as decoding takes it: one pass over the state. `tensors`: q to b."""
    q, k, v, beta, decay, *keys = tensors
    (n, _, h, dv), (g, dk) = v.shape, q.shape[2:]
    dtype = accumulate_dtype(v.dtype)
    output, final = v.new_empty(n, 1, h, dv, dtype=dtype), v.new_empty(n, h, dk, dv, dtype=dtype)
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(n, 1, h)
    channels = decay is not None and decay.dim() == 4
    views = [
        *(None if x is None else unit_stride(x[:, 0].to(dtype)) for x in (q, k, v, beta, decay, *keys)),
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        output[:, 0],
        final,
    ]
    numbers = [n, g, h, dk, dv, int(channels), tasks(final), native.bits(scale)]
    native.call("delta_rule", f"delta_rule_step_{native.suffix(dtype)}", views, numbers)
    return output.to(v.dtype), final


def _own(v: Tensor, beta: Tensor | None, *keys: Tensor | None) -> list[Tensor | None]:
    """beta, removal, a and b as the C++ code reads them, beta with any strides."""
    wide = accumulate_dtype(v.dtype)
    return [None if beta is None else beta.to(wide), *(None if x is None else unit_stride(x.to(wide)) for x in keys)]


@custom_op("omnimix::delta_rule_native")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    removal: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, final, saved = recurrence.outputs(q, v, cu_seqlens, BLOCK, train)
    result = output if output.dtype == final.dtype else torch.empty_like(output, dtype=final.dtype)
    sequences = final.shape[0]
    native.call(
        "delta_rule",
        f"delta_rule_forward_{native.suffix(final.dtype)}",
        [
            *recurrence.views(q, k, v, decay, initial_state, cu_seqlens, BLOCK),
            *(saved if train else None, final, result, *[None] * GRADIENTS),
            *_own(v, beta, removal, a, b),
        ],
        recurrence.numbers(q, v, decay, sequences, scale, BLOCK, recurrence.division(q, v, sequences)),
    )
    return result.to(output.dtype), final, saved


@_forward.register_fake
def _(q, k, v, beta, decay, removal, a, b, initial_state, cu_seqlens, scale, train):
    return recurrence.outputs(q, v, cu_seqlens, BLOCK, train)


@custom_op("omnimix::delta_rule_native_backward")
def _backward(
    doutput: Tensor,
    dfinal: Tensor | None,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    removal: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, wide = recurrence.views(q, k, v, decay, initial_state, cu_seqlens, BLOCK), saved.dtype
    sequences = inputs[-1].shape[0]
    parts = recurrence.division(q, v, sequences)
    _, heads, values = parts

    def room(count: int, x: Tensor | None, *more: int) -> Any:
        return None if x is None else shares(count, x, wide, *more)

    into_q, into_k, *into_keys = (room(heads * values, x) for x in (q, k, removal, a, b))
    # A decay per head has a share of each sequence too.
    of_each = decay is not None and decay.dim() == 1
    into_decay = room(values, decay, *[sequences] * of_each) if decay_gradient else None
    into_v, into_beta, into_state = room(1, v), room(values, beta), room(1, initial_state)
    native.call(
        "delta_rule",
        f"delta_rule_backward_{native.suffix(wide)}",
        [
            *(*inputs, saved, None if dfinal is None else dfinal.to(wide).contiguous(), doutput.to(wide).contiguous()),
            *(into_q, into_k, into_v, into_decay, into_state),
            *_own(v, beta, removal, a, b),
            *(into_beta, *into_keys),
        ],
        recurrence.numbers(q, v, decay, sequences, scale, BLOCK, parts),
    )
    given: Any = (q, k, v, beta, decay, removal, a, b, initial_state)
    found = (into_q, into_k, into_v, into_beta, into_decay, *into_keys, into_state)
    # A custom op has no optional outputs.
    gradients: Any = (v.new_empty(0) if x is None else joined(x, like) for x, like in zip(found, given, strict=True))
    return tuple(gradients)


@_backward.register_fake
def _(doutput, dfinal, saved, q, k, v, beta, decay, removal, a, b, initial_state, cu_seqlens, scale, decay_gradient):
    given = (q, k, v, beta, decay if decay_gradient else None, removal, a, b, initial_state)
    return tuple(v.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)


def _gradients(ctx: Any, doutput: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple:
    saved, *tensors = ctx.saved_tensors
    *given, _ = tensors
    v, decay_gradient = tensors[2], ctx.needs_input_grad[4]
    if doutput is None:
        doutput = v.new_zeros(v.shape)
    found = _backward(doutput, dfinal, saved, *tensors, ctx.scale, decay_gradient)
    needed = [x is not None and (i != 4 or decay_gradient) for i, x in enumerate(given)]
    return (*(g if n else None for g, n in zip(found, needed, strict=True)), None, None, None)


_forward.register_gradients(_gradients, _save)
