"""Triton kernels of `delta_rule`, chunk by chunk, forward and backward.

One recurrence serves all forms, S_t = diag(e^{g_t}) S_{t-1} + a_t u_tᵀ + k_t v_tᵀ with u_t = S_{t-1}ᵀ b_t. Without a it
is a = k, with u + v written along k (the delta form: Gated DeltaNet, arXiv 2412.06464; v is then beta v, and b is
-beta e^g times the removal key).

Given u, this is a gated linear recurrence with two writes, and the kernels of `gated_linear` do it. Within a chunk that
starts with the state S, with A_ij = b_iᵀ e^{G_{i-1} - G_j} a_j for j < i and B the same of k, the WY form (arXiv
2406.06484, section 3) is u = (I - A)^-1 (b e^G S + B v): `_inverse_kernel` computes T = (I - A)^-1, `_solve_kernel`
W = T b e^G and Y = T B v, and `_state` u = W S + Y, chunk after chunk.

The gradient x_t of S_t follows the same recurrence backwards, with a and b exchanged:
x_{t-1} = diag(e^{g_t}) x_t + b_t du_tᵀ + q_{t-1} do_{t-1}ᵀ with du_t = x_tᵀ a_t. So the same kernels give du, with
Tᵀ, and the other gradients are those of a gated linear recurrence with the reads (q, do), (b, du) and the writes
(k, v), (a, u), one `_gradient_kernel` for each pair: no gradient of T is needed. Without a, the gradient of v is du.

Bytes moved and operations for each chunk and head, C steps, element size s (states are as large as values):
inverse 2 C² s, 6 C³ at most; solve (2 C² + 2 C (K + V)) s, 2 C² (K + V + C); state (2 C (K + V) + K V) s and
4 C K V (6 with a); the others as in `gated_linear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import accumulate_dtype, dot_mode, grid, launches, on_device_of, tuned, unit_stride
from ..common.triton_chunks import CHANNEL, NONE, _chunk_at, _decays, _load, _of
from ..common.triton_launches import Chunks, chunking, largest, shared, stored, strides
from ..common.triton_steps import serves, shapes, step
from ..common.triton_tools import dot, unit_lower_inverse
from ..custom import custom_op


@tuned([{"num_warps": 4}], key=["C"])
@triton.jit
def _inverse_kernel(scores, inverse, C: tl.constexpr, MODE: tl.constexpr):
    """(I - scores)^-1. Program: chunk and head."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    at = pid * C * C + i[:, None] * C + i[None, :]
    tl.store(inverse + at, unit_lower_inverse(scores + pid * C * C, C, MODE).to(inverse.dtype.element_ty))


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY", "REVERSE"])
@triton.jit
def _solve_kernel(
    x, y, decay, inverse, mix, weights, base, table, bounds, x_strides, y_strides, d_strides, length, chunks, H, K, V,
    C: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """weights = inverse @ (x decayed from the chunk's boundary), base = inverse @ mix @ y; in REVERSE both transposed.

    Program: chunk and head.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // H, pid % H
    batch, low, end = _chunk_at(row, table, bounds, length, chunks, C, PACKED)
    high = tl.minimum(low + C, end)
    x = _of(x, x_strides, batch, head)
    y = _of(y, y_strides, batch, head)
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
    i, t = tl.arange(0, C), low + tl.arange(0, C)
    inside = (t < high)[:, None]
    rows = (batch * length + t[:, None]) * H + head
    square = pid * C * C + i[:, None] * C + i[None, :]
    solve = tl.load(inverse + square).to(ACC)
    if REVERSE:
        solve = tl.trans(solve)
    for c in range(0, K, BK):
        column = c + tl.arange(0, BK)
        xt = _load(x, t, low, high, column, K, x_strides[1], ACC)
        if DECAY != NONE:
            if DECAY == CHANNEL:
                prefix, suffix, _ = _decays(decay, t, low, high, column, K, d_strides[1], ACC, 1)
            else:
                prefix, suffix, _ = _decays(decay, t, low, high, tl.arange(0, 1), 1, d_strides[1], ACC, 1)
            if REVERSE:
                xt *= tl.exp(suffix)
            else:
                xt *= tl.exp(prefix)
        found = dot(solve, xt, MODE).to(weights.dtype.element_ty)
        tl.store(weights + rows * K + column[None, :], found, mask=inside & (column < K)[None, :])
    if mix is not None:
        mixing = tl.load(mix + square).to(ACC)
        if REVERSE:
            mixing = tl.trans(mixing)
        solve = dot(solve, mixing, MODE)
    for c in range(0, V, BV):
        value = c + tl.arange(0, BV)
        found = dot(solve, _load(y, t, low, high, value, V, y_strides[1], ACC), MODE).to(base.dtype.element_ty)
        tl.store(base + rows * V + value[None, :], found, mask=inside & (value < V)[None, :])


class _Call(Chunks):
    def inverse(self, scores: Tensor, out: Tensor) -> None:
        """(I - scores)^-1, (rows, h, size, size), in float32: errors in it grow from step to step."""
        mode = dot_mode(accumulate_dtype(self.v.dtype))
        _inverse_kernel[grid(self.rows * self.heads)](scores, out, C=self.size, MODE=mode)

    def solve(self, x, y, inverse, mix: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """`states`' weights and base, (b, t, h, k) and (b, t, h, v)."""
        shape = (self.batch, self.length, self.heads)
        weights, base = (self.new(*shape, n, dtype=self.stored) for n in (self.width, self.width_v))
        common = self.common(self.width, self.form)
        del common["EXCLUSIVE"], common["scale"]
        _solve_kernel[grid(self.rows * self.heads)](
            x, y, self.decay, inverse, mix, weights, base, self.table, x_strides=strides(x, self.heads),
            y_strides=strides(y, self.heads), V=self.width_v, REVERSE=reverse, BV=self.bv, **common,
        )  # fmt: skip
        return weights, base


def _most(v: Tensor) -> int:
    """Steps in a chunk, at most: with more, the inverse and the state kernel do not fit registers."""
    return largest(v.dtype) // 2


def _prepared(q, k, v, a, b, decay, initial_state, cu_seqlens):
    """The call, and its tensors as the kernels read them."""
    call = _Call(v, q.shape[3], decay, cu_seqlens, _most(v))
    a = None if a is None else unit_stride(a)
    initial = None if initial_state is None else initial_state.contiguous()
    return call, unit_stride(q), unit_stride(k), unit_stride(v), a, unit_stride(b), initial


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the last state, and what the backward pass takes: u (u + v without a), and T and the scores."""
    call, q, k, v, a, b, initial = _prepared(q, k, v, a, b, decay, initial_state, cu_seqlens)
    square = (call.rows, call.heads, call.size, call.size)
    kept = call.new(2 if a is None else 4, *square, dtype=call.stored)
    u = call.new(*v.shape, dtype=call.stored)
    with on_device_of(v):
        call.inverse(call.scores(b, k if a is None else a, exclusive=True, out=call.new(*square)), kept[0])
        read = call.scores(q, k, scale, out=kept[1])
        if a is None:
            weights, base = call.solve(b, v, kept[0])
            states, final = call.states(k, None, initial, values=u, weights=weights, base=base)
            return call.outputs(q, u, read, states, scale), final, u, kept
        read_a = call.scores(q, a, scale, out=kept[2])
        weights, base = call.solve(b, v, kept[0], call.scores(b, k, exclusive=True, out=kept[3]))
        states, final = call.states(k, v, initial, more=a, values=u, weights=weights, base=base)
        return call.outputs(q, v, read, states, scale, more_scores=read_a, more=u), final, u, kept


def _launch_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, u: Tensor, kept: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call, q, k, v, a, b, initial = _prepared(q, k, v, a, b, decay, initial_state, cu_seqlens)
    do, dfinal = do.contiguous(), dfinal.contiguous()
    du, da = call.new(*v.shape, dtype=call.stored), call.new(0)
    with on_device_of(v):
        if a is None:
            states, _ = call.states(k, u, initial)
            weights, base = call.solve(k, do, kept[0], kept[1], reverse=True)
        else:
            states, _ = call.states(k, v, initial, more=a, values=u)
            weights, base = call.solve(a, do, kept[0], kept[2], reverse=True)
        grads, into_initial = call.states(
            q, do, dfinal, scale, reverse=True, more=b, values=du, weights=weights, base=base
        )

        def plain(x, y, scale=1.0):
            return call.scores(x, y, scale, decayed=False)

        both = {"states": states, "state_grads": grads}
        if a is None:
            dv = du
            dq, dk, dd, _ = call.gradients(q, k, do, u, plain(do, u, scale), scale, **both)
            db, _, _, _ = call.gradients(b, k, du, u, plain(du, u), states=states, exclusive=True, dk=dk, dd=dd)
        else:
            dv = call.outputs(k, do, kept[1], grads, reverse=True, more_scores=kept[3], more=du)
            dq, dk, dd, _ = call.gradients(q, k, do, v, plain(do, v, scale), scale, **both)
            db, da, _, _ = call.gradients(b, a, du, u, plain(du, u), exclusive=True, dd=dd, **both)
            call.gradients(q, a, do, u, plain(do, u, scale), dq=dq, dk=da, dd=dd)
            call.gradients(b, k, du, v, plain(du, v), exclusive=True, dq=db, dk=dk, dd=dd)
            da = shared(da, a)
    if decay is not None:
        dd = (dd.sum(0) if decay.dim() == 3 else dd).to(decay.dtype)
    into_initial = call.new(0) if initial_state is None else into_initial
    return shared(dq, q), shared(dk, k), dv.to(v.dtype), da, shared(db, b), dd, into_initial


_forward = custom_op("omnimix::delta_rule_triton", _launch_forward)
_backward = custom_op("omnimix::delta_rule_triton_backward", _launch_backward)


@_forward.register_fake
@launches(_launch_forward)
def _(q, k, v, a, b, decay, initial_state, cu_seqlens, scale):
    size, _, sequences, rows = chunking(v, cu_seqlens, _most(v))
    heads, kept = v.shape[2], stored(v.dtype)
    state = v.new_empty(sequences, heads, q.shape[3], v.shape[3], dtype=accumulate_dtype(v.dtype))
    squares = v.new_empty(2 if a is None else 4, rows, heads, size, size, dtype=kept)
    return v.new_empty(v.shape), state, v.new_empty(v.shape, dtype=kept), squares


@_backward.register_fake
@launches(_launch_backward)
def _(do, dfinal, q, k, v, a, b, decay, initial_state, cu_seqlens, u, kept, scale):
    def like(x):
        return v.new_empty(0, dtype=accumulate_dtype(v.dtype)) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, a, b, decay, initial_state))


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, do, dfinal, du, dkept):
    grads = torch.ops.omnimix.delta_rule_triton_backward(do, dfinal, *ctx.saved_tensors, ctx.scale)
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None)


_forward.register_gradients(_differentiate, _save)


def _launch_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return step(q, k, v, a, b, decay, None, initial_state, scale)


_step = custom_op("omnimix::delta_rule_triton_step", _launch_step)


@_step.register_fake
@launches(_launch_step)
def _(q, k, v, a, b, decay, initial_state, scale):
    return shapes(q, v)


def _save_step(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_step(ctx, do, dstate):
    tensors = ctx.saved_tensors
    kept = torch.ops.omnimix.delta_rule_triton(*tensors, None, ctx.scale)[2:]
    grads = torch.ops.omnimix.delta_rule_triton_backward(do, dstate, *tensors, None, *kept, ctx.scale)
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None)


_step.register_gradients(_differentiate_step, _save_step)


def delta_rule_triton(
    *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, decay: Tensor | None, removal: Tensor | None,
    a: Tensor | None, b: Tensor | None, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = accumulate_dtype(v.dtype)
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(v.shape[:3])
    if b is None:
        b = -(k if removal is None else removal).to(wide)
        factor = None if beta is None else beta.to(wide).unsqueeze(-1)
        if factor is not None:
            v = (v.to(wide) * factor).to(v.dtype)
        if decay is not None:
            retain = decay.to(wide).exp()
            retain = retain if decay.dim() == 4 else retain.unsqueeze(-1)
            factor = retain if factor is None else factor * retain
        if factor is not None:
            b = b.repeat_interleave(v.shape[2] // b.shape[2], dim=2) * factor
        b = b.to(k.dtype)
    if initial_state is not None:
        initial_state = initial_state.to(wide)
    if serves(q, v, cu_seqlens):
        return torch.ops.omnimix.delta_rule_triton_step(q, k, v, a, b, decay, initial_state, scale)
    output, state, _, _ = torch.ops.omnimix.delta_rule_triton(
        q, k, v, a, b, decay, initial_state, cu_seqlens, scale
    )  # fmt: skip
    return output, state
