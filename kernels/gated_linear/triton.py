"""Triton backend of `gated_linear`: the kernels are in `common.triton_chunks`, launchers in `common.triton_launches`.

A `bonus` makes the reads exclusive: the output sees the state before the step's own decay and update.
"""

import torch
from torch import Tensor

from ..common.tools import accumulate_dtype, launches, on_device_of, unit_stride
from ..common.triton_launches import Chunks, chunking, largest, shared, stored
from ..common.triton_steps import serves, shapes, step
from ..custom import custom_op


def _prepared(q, k, v, bonus, initial_state):
    """The arguments as the kernels read them."""
    bonus, initial = (None if x is None else x.contiguous() for x in (bonus, initial_state))
    return unit_stride(q), unit_stride(k), unit_stride(v), bonus, initial


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the last state, and the scores, which the backward pass takes."""
    q, k, v, bonus, initial = _prepared(q, k, v, bonus, initial_state)
    call = Chunks(v, q.shape[3], decay, cu_seqlens, largest(v.dtype))
    exclusive = bonus is not None
    with on_device_of(v):
        states, final = call.states(k, v, initial)
        scores = call.scores(q, k, scale, exclusive=exclusive, bonus=bonus)
        return call.outputs(q, v, scores, states, scale, exclusive=exclusive), final, scores


def _launch_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scores: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, bonus, initial = _prepared(q, k, v, bonus, initial_state)
    call = Chunks(v, q.shape[3], decay, cu_seqlens, largest(v.dtype))
    do, dfinal = do.contiguous(), dfinal.contiguous()
    exclusive = bonus is not None
    with on_device_of(v):
        # Recomputed, since a state for every chunk is more than the inputs they come from.
        states, _ = call.states(k, v, initial)
        state_grads, into_initial = call.states(q, do, dfinal, scale, exclusive=exclusive, reverse=True)
        dv = call.outputs(k, do, scores, state_grads, reverse=True)
        score_grads = call.scores(do, v, scale, decayed=False)
        dq, dk, dd, du = call.gradients(
            q, k, do, v, score_grads, scale, states=states, state_grads=state_grads, exclusive=exclusive, bonus=bonus,
            dtype=q.dtype if q.shape[2] == v.shape[2] else None,
        )  # fmt: skip
    dq, dk = shared(dq, q), shared(dk, k)
    if decay is not None:
        dd = (dd.sum(0) if decay.dim() == 3 else dd).to(decay.dtype)
    if bonus is not None:
        du = du.sum(0).to(bonus.dtype)
    return dq, dk, dv, dd, du, call.new(0) if initial_state is None else into_initial


_forward = custom_op("omnimix::gated_linear_triton", _launch_forward)
_backward = custom_op("omnimix::gated_linear_triton_backward", _launch_backward)


@_forward.register_fake
@launches(_launch_forward)
def _(q, k, v, decay, bonus, initial_state, cu_seqlens, scale):
    size, _, sequences, rows = chunking(v, cu_seqlens, largest(v.dtype))
    state = v.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=accumulate_dtype(v.dtype))
    return v.new_empty(v.shape), state, v.new_empty(rows, v.shape[2], size, size, dtype=stored(v.dtype))


@_backward.register_fake
@launches(_launch_backward)
def _(do, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, scores, scale):
    def like(x):
        return v.new_empty(0, dtype=accumulate_dtype(v.dtype)) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, decay, bonus, initial_state))


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, do, dfinal, dscores):
    grads = torch.ops.omnimix.gated_linear_triton_backward(do, dfinal, *ctx.saved_tensors, ctx.scale)
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None)


_forward.register_gradients(_differentiate, _save)


def _launch_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return step(q, k, v, None, None, decay, bonus, initial_state, scale)


_step = custom_op("omnimix::gated_linear_triton_step", _launch_step)


@_step.register_fake
@launches(_launch_step)
def _(q, k, v, decay, bonus, initial_state, scale):
    return shapes(q, v)


def _save_step(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_step(ctx, do, dstate):
    tensors = ctx.saved_tensors
    scores = torch.ops.omnimix.gated_linear_triton(*tensors, None, ctx.scale)[2]
    grads = torch.ops.omnimix.gated_linear_triton_backward(do, dstate, *tensors, None, scores, ctx.scale)
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None)


_step.register_gradients(_differentiate_step, _save_step)


def gated_linear_triton(
    *, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(v.shape[:3])
    if initial_state is not None:
        initial_state = initial_state.to(accumulate_dtype(v.dtype))
    if serves(q, v, cu_seqlens):
        return torch.ops.omnimix.gated_linear_triton_step(q, k, v, decay, bonus, initial_state, scale)
    output, state, _ = torch.ops.omnimix.gated_linear_triton(q, k, v, decay, bonus, initial_state, cu_seqlens, scale)
    return output, state
