"""`delta_rule` by matrix products over chunks of time, in plain torch, on any device.

The state goes from block to block in a loop whose scratch memory fits into the cache; the algebra of a block is in
`chunked_block`, its operands in `chunked_inputs`. Forward and backward are custom ops, because torch.compile cannot
trace a loop over blocks that depends on the decays' values. The backward pass starts from the states at the blocks'
starts, which the forward pass keeps; everything within a block it computes again.
"""

from typing import Any

import torch
from torch import Tensor

from ..common.chunked_plan import CHUNK, Block, Packing, batch_blocks, saved_states
from ..custom import custom_op
from .chunked_block import Blocks
from .chunked_inputs import Inputs, Sequences

NAMES = ("q", "k", "v", "beta", "decay", "removal", "a", "b")


def delta_rule_chunked(
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
    if v.shape[1] == 1 and cu_seqlens is None:
        return _one_step(q, k, v, beta, decay, (removal, a, b), scale, initial_state)
    if decay is not None and decay.dim() == 1:
        decay = decay.to(torch.promote_types(v.dtype, torch.float32)).expand(v.shape[:3])
    inputs = (q, k, v, beta, decay, removal, a, b, initial_state)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, state, _ = _forward(q, k, v, beta, decay, removal, a, b, initial_state, cu_seqlens, scale, train)
    return output, state


def _one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    keys: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A single step needs no plan: plain torch, which autograd and torch.compile go through. `keys`: removal, a, b."""
    dtype, groups = v.dtype, q.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    # (b, g, 1 or h / g, k or v): heads that share q and k are broadcast over, not copied.
    first: Any = (None if x is None else x[:, 0].to(wide).unsqueeze(2) for x in (q, k, *keys))
    q, k, removal, a, b = first
    v = v[:, 0].to(wide).unflatten(1, (groups, -1))
    zeros = v.new_zeros(*v.shape[:3], k.shape[-1], v.shape[-1])
    state = zeros if state is None else state.to(wide).unflatten(1, (groups, -1))
    kept = state
    if decay is not None:
        retain = decay.to(wide) if decay.dim() == 1 else decay[:, 0].to(wide)
        retain = (retain if decay.dim() == 4 else retain.unsqueeze(-1)).unflatten(-2, (groups, -1))
        kept = state * retain.exp().unsqueeze(-1)
    if a is None:
        change = v - ((k if removal is None else removal).unsqueeze(-2) @ kept).squeeze(-2)
        change = change if beta is None else change * beta[:, 0].to(wide).unflatten(1, (groups, -1)).unsqueeze(-1)
        after = torch.addcmul(kept, k.unsqueeze(-1), change.unsqueeze(-2))
    else:
        after = torch.addcmul(kept, a.unsqueeze(-1), b.unsqueeze(-2) @ state)
        after = torch.addcmul(after, k.unsqueeze(-1), v.unsqueeze(-2))
    output = (q.unsqueeze(-2) @ after).squeeze(-2) * scale
    return output.flatten(1, 2).unsqueeze(1).to(dtype), after.flatten(1, 2)


def _chunk_bytes(q: Tensor, v: Tensor) -> int:
    """About what a chunk of one sequence occupies while it is worked on."""
    dk, (t, h, dv) = q.shape[-1], v.shape[1:]
    return 4 * h * (2 * min(t, CHUNK) * (dk + dv) + dk * dv)


def _blocks(v: Tensor, packing: Packing | None, chunk_bytes: int) -> list[Block]:
    return packing.blocks if packing else list(batch_blocks(v.shape[0], v.shape[1], chunk_bytes))


def _start(final: Tensor, initial_state: Tensor | None, packing: Packing | None) -> Tensor:
    """A state of our own to continue from."""
    if initial_state is None:
        return torch.zeros_like(final)
    state = packing.sort(initial_state) if packing else initial_state
    return torch.empty_like(final).copy_(state)


@custom_op("omnimix::delta_rule_chunked")
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
    tensors = (q, k, v, beta, decay, removal, a, b)
    output, final, saved = _outputs(*tensors, initial_state, cu_seqlens, scale, train)
    chunk_bytes = _chunk_bytes(q, v)
    packing = None if cu_seqlens is None else Packing(cu_seqlens, chunk_bytes)
    sequences = Sequences.of(dict(zip(NAMES, tensors, strict=True)), q.shape[2], packing)
    blocks = Blocks(Inputs(sequences, final.dtype), scale)
    state = _start(final, initial_state, packing)
    dense = output.new_empty(1, packing.length, *output.shape[2:]) if packing else output
    by_group = dense.unflatten(2, (q.shape[2], -1))
    used = 0
    for block in _blocks(v, packing, chunk_bytes):
        now = state[block.states]
        if train:
            used = block.saved + block.alive
            saved[block.saved : used] = now[: block.alive].flatten(1)
        blocks.forward(block, now.flatten(0, 1), by_group)
    if train:
        # Blocks of several chunks need fewer states than there is space for.
        saved[used:] = 0
    if packing:
        return packing.unpack(dense), packing.unsort(state), saved
    return output, state, saved


@_forward.register_fake
def _outputs(q, k, v, beta, decay, removal, a, b, initial_state, cu_seqlens, scale, train):
    """Empty tensors of the shapes of the output, the final state and the saved states."""
    (batch, t, h, dv), dk = v.shape, q.shape[-1]
    n = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.promote_types(v.dtype, torch.float32)
    rows = saved_states(batch * t, n) if train else 0
    return (
        v.new_empty(batch, t, h, dv),
        v.new_empty(n, h, dk, dv, dtype=wide),
        v.new_empty(rows, h * dk * dv, dtype=wide),
    )


@custom_op("omnimix::delta_rule_chunked_backward")
def _backward(
    doutput: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    removal: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor,
    saved: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunk_bytes = _chunk_bytes(q, v)
    packing = None if cu_seqlens is None else Packing(cu_seqlens, chunk_bytes)
    tensors: dict[str, Tensor | None] = dict(zip(NAMES, (q, k, v, beta, decay, removal, a, b), strict=True))
    sequences = Sequences.of(tensors, q.shape[2], packing)
    inputs = Inputs(sequences, final.dtype)
    doutput = v.new_zeros(1, 1, 1, 1).expand(v.shape) if doutput is None else doutput
    doutput = (packing.pack(doutput) if packing else doutput).unflatten(2, (q.shape[2], -1))
    dstate = _start(final, dfinal, packing)
    tail = _tail(inputs, dstate, packing.sort(final) if packing else final)
    gradients = {name: _room(x, packing) for name, x in tensors.items()}
    to = Sequences.of(gradients, q.shape[2], None)
    blocks = Blocks(inputs, scale)
    for block in reversed(_blocks(v, packing, chunk_bytes)):
        start = saved[block.saved : block.saved + block.alive].view(-1, *final.shape[2:])
        state = inputs.scratch("state", *start.shape).copy_(start)
        at = None if tail is None else tail[block.states].flatten(0, 1)
        blocks.backward(block, state, dstate[block.states].flatten(0, 1), doutput, at, to)
    if packing:
        gradients = {name: None if x is None else packing.unpack(x) for name, x in gradients.items()}
        dstate = packing.unsort(dstate)
    # A custom op has no optional outputs.
    found: Any = (*(v.new_empty(0) if x is None else x for x in gradients.values()), dstate)
    return found


def _room(x: Tensor | None, packing: Packing | None) -> Tensor | None:
    """Where the gradient of `x` goes."""
    if x is None:
        return None
    shape = (1, packing.length, *x.shape[2:]) if packing else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _tail(inputs: Inputs, dfinal: Tensor, final: Tensor) -> Tensor | None:
    """What the final state contributes to the gradient of the decays before it, `(n, h, 1 or k)`."""
    if inputs.at.decay is None:
        return None
    overlap = (dfinal * final).sum(-1)
    return overlap if inputs.channel else overlap.sum(-1, keepdim=True)


@_backward.register_fake
def _(doutput, dfinal, q, k, v, beta, decay, removal, a, b, cu_seqlens, final, saved, scale):
    def like(x: Tensor | None) -> Tensor:
        return v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return (*map(like, (q, k, v, beta, decay, removal, a, b)), torch.empty_like(final))


def _setup(ctx, inputs, output) -> None:
    *tensors, initial_state, cu_seqlens, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, cu_seqlens, *output[1:])


def _gradients(ctx, doutput: Tensor | None, dfinal: Tensor | None, _: Tensor | None):
    *tensors, cu_seqlens, final, saved = ctx.saved_tensors
    doutput, dfinal = (None if x is None else x.contiguous() for x in (doutput, dfinal))
    *gradients, dstate = _backward(doutput, dfinal, *tensors, cu_seqlens, final, saved, ctx.scale)
    return (
        *(None if x is None else g for x, g in zip(tensors, gradients, strict=True)),
        None if ctx.state_dtype is None else dstate.to(ctx.state_dtype),
        None,
        None,
        None,
    )


_forward.register_gradients(_gradients, _setup)
