"""`gated_linear` in C++ (native.cpp), for CPUs: the recurrence itself, with tiles of the state in registers.

Forward and backward are custom ops. The backward pass starts from the states at the starts of blocks of tokens, which
the forward pass keeps, and computes those within a block again. Decoding's single steps have a function of their own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..common.steps import tasks
from ..common.tools import accumulate_dtype, unit_stride
from ..custom import custom_op
from .bonus import with_bonus

# Tokens between the saved states, a multiple of the chunks in native.cpp: the fewer, the more memory they take; the
# more, the less of a block stays in the second-level cache.
BLOCK = 128
# The kinds of decays in native.cpp (none, per head, per step, per channel), by how many dimensions they have.
KINDS = {None: 0, 1: 1, 3: 2, 4: 3}
# Elements of the states, times tokens, for which it is worth waking a thread.
SMALLEST = 1 << 17


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


def _division(q: Tensor, v: Tensor, sequences: int) -> tuple[int, int, int]:
    """Threads, and into how many parts the heads of a group and the values of a head are divided among tasks.

    Each part has gradients of q and k of its own, and slices of values work out the same decays: so no more of them
    than keep the threads busy.
    """
    (b, t, h, dv), (g, dk) = v.shape, q.shape[2:]
    threads = max(1, min(torch.get_num_threads(), b * t * h * dk * dv // SMALLEST))
    if threads == 1:
        return 1, 1, 1
    heads = min(h // g, -(-2 * threads // (sequences * g)))
    whole = sequences * g * heads
    if whole % threads == 0 or whole >= 4 * threads:
        return threads, heads, 1
    lanes = 64 // accumulate_dtype(v.dtype).itemsize
    return threads, heads, min(threads // math.gcd(whole, threads), -(-dv // lanes))


def _numbers(q: Tensor, v: Tensor, decay: Tensor | None, sequences: int, scale: float, exclusive: bool) -> list[int]:
    """Sizes and options; the three last are the parts of heads, those of values, and the scale."""
    threads, heads, values = _division(q, v, sequences)
    kind = KINDS[None if decay is None else decay.dim()]
    sizes = [v.shape[0] * v.shape[1], v.shape[1], q.shape[2], v.shape[2], q.shape[3], v.shape[3], BLOCK]
    return [threads, sequences, *sizes, kind, int(exclusive), heads, values, native.bits(scale)]


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor | None]:
    """The arguments as the C++ code reads them: in one dtype, and where sequences start and end."""
    wide = accumulate_dtype(v.dtype)
    if decay is not None:
        decay = decay.to(wide)
        # A scalar decay is read with any strides.
        decay = unit_stride(decay) if decay.dim() == 4 else decay.expand(v.shape[:3])
    return [
        *(unit_stride(x.to(wide)) for x in (q, k, v)),
        decay,
        None if initial_state is None else initial_state.to(wide).contiguous(),
        native.segments(v.shape[0], v.shape[1], cu_seqlens, BLOCK),
    ]


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
    native.call(
        "gated_linear",
        f"gated_linear_forward_{native.suffix(final.dtype)}",
        [*_inputs(q, k, v, decay, initial_state, cu_seqlens), saved if train else None, final, result],
        _numbers(q, v, decay, final.shape[0], scale, exclusive),
    )
    return result.to(output.dtype), final, saved


@_forward.register_fake
def _outputs(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train):
    """Empty tensors for the output, the final state and the states at the starts of all blocks but the first."""
    (b, t, h, dv), dk = v.shape, q.shape[-1]
    wide = accumulate_dtype(v.dtype)
    n = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = 0 if not train else b * ((t - 1) // BLOCK) if cu_seqlens is None else t // BLOCK
    return (
        v.new_empty(b, t, h, dv),
        v.new_empty(n, h, dk, dv, dtype=wide),
        v.new_empty(blocks, h, dk, dv, dtype=wide),
    )


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
    inputs, wide = _inputs(q, k, v, decay, initial_state, cu_seqlens), saved.dtype
    sequences = inputs[-1].shape[0]
    numbers = _numbers(q, v, decay, sequences, scale, exclusive)
    heads, values = numbers[-3:-1]

    def empty(shares: int, like: Tensor, *sequences: int) -> Tensor:
        """For as many shares in a gradient, summed below: so results do not depend on which thread was first."""
        shape = (*sequences, *like.shape)
        return v.new_empty(shape if shares == 1 else (shares, *shape), dtype=wide)

    into_q, into_k, into_v = empty(heads * values, q), empty(heads * values, k), empty(1, v)
    into_decay, into_state = None, None if initial_state is None else empty(1, initial_state)
    if decay_gradient:
        # A decay per head has a share of each sequence too.
        into_decay = empty(values, decay, *[sequences] * (decay.dim() == 1))
    native.call(
        "gated_linear",
        f"gated_linear_backward_{native.suffix(wide)}",
        [
            *(*inputs, saved, None if dfinal is None else dfinal.to(wide).contiguous(), doutput.to(wide).contiguous()),
            *(into_q, into_k, into_v, into_decay, into_state),
        ],
        numbers,
    )
    found = ((into_q, q), (into_k, k), (into_v, v), (into_decay, decay), (into_state, initial_state))
    return tuple(v.new_empty(0) if into is None else _joined(into, x) for into, x in found)


def _joined(shares: Tensor, like: Tensor) -> Tensor:
    """The sum of the shares in a gradient, in the dtype of what it is the gradient of."""
    more = shares.dim() - like.dim()
    return (shares.sum(tuple(range(more))) if more else shares).to(like.dtype)


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
