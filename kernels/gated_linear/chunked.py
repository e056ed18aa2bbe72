"""`gated_linear` by matrix products over chunks of time, in plain torch, on any device.

The state goes from block to block in a loop whose scratch memory fits into the cache (`chunked_plan`); the algebra of
a block is in `chunked_forms`. Forward and backward are custom ops, because torch.compile cannot trace a loop over
blocks that depends on the decays' values. The backward pass starts from the states at the blocks' starts, which the
forward pass keeps; everything within a block it computes again.
"""

import torch
from torch import Tensor

from ..common.chunked_plan import Block, Packing, batch_blocks, saved_states
from ..custom import custom_op
from .bonus import with_bonus
from .chunked_channel import ChannelForm
from .chunked_forms import Adjoint, Form
from .chunked_scalar import ScalarForm

# After so many chunks the decays' gradient is taken afresh from the state.
FRESH = 8


def gated_linear_chunked(
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
    t, h = v.shape[1:3]
    if t == 1 and cu_seqlens is None:
        return _one_step(q, k, v, decay, bonus, scale, initial_state)
    wide = torch.promote_types(v.dtype, torch.float32)
    decay = v.new_zeros(h, dtype=wide) if decay is None else decay
    if decay.dim() == 1:
        decay = decay.to(wide)
    return with_bonus(_forward, q, k, v, decay, bonus, scale, initial_state, cu_seqlens)


def _one_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A single step needs no plan: plain torch, which autograd and torch.compile go through."""
    dtype, groups = v.dtype, q.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    # (b, g, 1 or h / g, k or v): heads that share q and k are broadcast over, not copied.
    q, k, v = q[:, 0].to(wide).unsqueeze(2), k[:, 0].to(wide).unsqueeze(2), v[:, 0].to(wide).unflatten(1, (groups, -1))
    write = k.unsqueeze(-1) * v.unsqueeze(-2)
    before = torch.zeros_like(write) if state is None else state.to(wide).unflatten(1, (groups, -1))
    after = before + write
    if decay is not None:
        retain = decay.to(wide) if decay.dim() == 1 else decay[:, 0].to(wide)
        retain = (retain if decay.dim() == 4 else retain.unsqueeze(-1)).unflatten(-2, (groups, -1)).exp()
        after = torch.addcmul(write, before, retain.unsqueeze(-1))
    read = after
    if bonus is not None:
        read = torch.addcmul(before, write, bonus.to(wide).unflatten(0, (groups, -1)).unsqueeze(-1))
    output = (q.unsqueeze(-2) @ read).squeeze(-2) * scale
    return output.flatten(1, 2).unsqueeze(1).to(dtype), after.flatten(1, 2)


def _form(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, packing: Packing | None, scale: float, exclusive: bool
) -> Form:
    """The form that serves these inputs, which it lays out with `packing`."""
    groups, steps = q.shape[2], None
    kind = ChannelForm if decay.dim() == 4 else ScalarForm
    if decay.dim() == 1:
        decay, steps = decay.expand(v.shape[:3]), decay.new_ones(1).expand(v.shape[:2])
    if packing:
        q, k, v, decay = (packing.pack(x) for x in (q, k, v, decay))
        steps = None if steps is None else packing.pack(steps)
    v, decay = (x.unflatten(2, (groups, -1)) for x in (v, decay))
    return kind(q=q, k=k, v=v, decay=decay, scale=scale, exclusive=exclusive, steps=steps)


def _chunk_bytes(q: Tensor, v: Tensor) -> int:
    """About what one chunk of one sequence occupies while it is worked on."""
    dk, (h, dv) = q.shape[-1], v.shape[-2:]
    return 4 * h * (64 * (dk + 2 * dv) + dk * dv)


def _blocks(v: Tensor, packing: Packing | None, chunk_bytes: int) -> list[Block]:
    return packing.blocks if packing else list(batch_blocks(v.shape[0], v.shape[1], chunk_bytes))


@custom_op("omnimix::gated_linear_chunked")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    exclusive: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chunk_bytes = _chunk_bytes(q, v)
    output, final, saved = _outputs(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train)
    packing = None if cu_seqlens is None else Packing(cu_seqlens, chunk_bytes)
    form = _form(q, k, v, decay, packing, scale, exclusive)
    if initial_state is None:
        state = final.new_zeros(final.shape[0], *form.state_shape)
    else:
        state = form.import_state(packing.sort(initial_state) if packing else initial_state)
    dense = output.new_empty(1, packing.length, *output.shape[2:]) if packing else output
    by_group = dense.unflatten(2, (form.groups, -1))
    used = 0
    for block in _blocks(v, packing, chunk_bytes):
        now = state[block.states]
        used = block.saved + block.alive
        if train:
            saved[block.saved : used] = now[: block.alive].flatten(1)
        form.forward(block, now, by_group)
    if train:
        # Blocks of several chunks need fewer states than there is space for.
        saved[used:] = 0
    state = form.export_state(state)
    if packing:
        return packing.unpack(dense), packing.unsort(state), saved
    return output, state, saved


@_forward.register_fake
def _outputs(q, k, v, decay, initial_state, cu_seqlens, scale, exclusive, train):
    """Empty tensors of the shapes of the output, the final state and the saved states."""
    (b, t, h, dv), dk = v.shape, q.shape[-1]
    n = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.promote_types(v.dtype, torch.float32)
    rows = saved_states(b * t, n) if train else 0
    return (
        v.new_empty(b, t, h, dv, dtype=wide),
        v.new_empty(n, h, dk, dv, dtype=wide),
        v.new_empty(rows, h * dk * dv, dtype=wide),
    )


@custom_op("omnimix::gated_linear_chunked_backward")
def _backward(
    doutput: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    output: Tensor,
    final: Tensor,
    saved: Tensor,
    scale: float,
    exclusive: bool,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunk_bytes = _chunk_bytes(q, v)
    packing = None if cu_seqlens is None else Packing(cu_seqlens, chunk_bytes)
    if packing:
        output, doutput = packing.pack(output), packing.pack(doutput)
        final = packing.sort(final)
        dfinal = None if dfinal is None else packing.sort(dfinal)
    form = _form(q, k, v, decay, packing, scale, exclusive)
    if dfinal is None:
        dstate = final.new_zeros(final.shape[0], *form.state_shape)
        tail = torch.zeros_like(form.overlap(dstate, dstate))
    else:
        dstate = form.import_state(dfinal)
        tail = form.overlap(dstate, form.import_state(final))
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (form.q, form.k, form.v.flatten(2, 3))]
    dq, dk, dv = gradients
    dv, output, doutput = (x.unflatten(2, (form.groups, -1)) for x in (dv, output, doutput))
    ddecay = _decay_gradient(form, decay) if decay_gradient else None
    into = Adjoint(output=output, doutput=doutput, q=dq, k=dk, v=dv, decay=ddecay, tail=tail)
    chunks = 0
    for block in reversed(_blocks(v, packing, chunk_bytes)):
        start = saved[block.saved : block.saved + block.alive].view(block.alive, *form.state_shape)
        now = dstate[block.states]
        form.backward(block, start, now, into)
        chunks += len(block.steps)
        if decay_gradient and chunks >= FRESH:
            # The tail is a running sum over time; taken from the state it is exact, and rounding does not pile up.
            tail[block.states][: block.alive] = form.overlap(now[: block.alive], start)
            chunks = 0
    dstate = form.export_state(dstate)
    if packing:
        gradients = [packing.unpack(x) for x in gradients]
        dstate = packing.unsort(dstate)
    dq, dk, dv = gradients
    if ddecay is None:
        return dq, dk, dv, decay.new_empty(0), dstate
    if decay.dim() == 1:
        return dq, dk, dv, ddecay.flatten().to(decay.dtype), dstate
    ddecay = ddecay.flatten(2, 3)
    return dq, dk, dv, packing.unpack(ddecay) if packing else ddecay, dstate


def _decay_gradient(form: Form, decay: Tensor) -> Tensor:
    """Where the form writes the decay's gradient; per head it is a sum, taken in the working dtype."""
    if decay.dim() == 1:
        return decay.new_zeros(form.groups, form.heads, dtype=form.dtype)
    return torch.empty(form.decay.shape, dtype=decay.dtype, device=decay.device)


@_backward.register_fake
def _(doutput, dfinal, q, k, v, decay, cu_seqlens, output, final, saved, scale, exclusive, decay_gradient):
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, decay)]
    if not decay_gradient:
        gradients[3] = decay.new_empty(0)
    return (*gradients, torch.empty_like(final))


def _setup(ctx, inputs, output) -> None:
    q, k, v, decay, initial_state, cu_seqlens, ctx.scale, ctx.exclusive, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, decay, cu_seqlens, *output)


def _gradients(ctx, doutput: Tensor | None, dfinal: Tensor | None, _: Tensor | None):
    q, k, v, decay, cu_seqlens, output, final, saved = ctx.saved_tensors
    doutput = torch.zeros_like(output) if doutput is None else doutput.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, ddecay, dstate = _backward(
        doutput,
        dfinal,
        q,
        k,
        v,
        decay,
        cu_seqlens,
        output,
        final,
        saved,
        ctx.scale,
        ctx.exclusive,
        ctx.needs_input_grad[3],
    )
    return (
        dq,
        dk,
        dv,
        ddecay if ctx.needs_input_grad[3] else None,
        None if ctx.state_dtype is None else dstate.to(ctx.state_dtype),
        None,
        None,
        None,
        None,
    )


_forward.register_gradients(_gradients, _setup)
