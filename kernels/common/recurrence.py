"""What the native kernels of recurrences with a matrix state share: the arguments as recurrence.h reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import native
from .tools import accumulate_dtype, unit_stride

# The kinds of decays in recurrence.h (none, per head, per step, per channel), by how many dimensions they have.
KINDS = {None: 0, 1: 1, 3: 2, 4: 3}
# Elements of the states, times tokens, for which it is worth waking a thread.
SMALLEST = 1 << 17


def division(q: Tensor, v: Tensor, sequences: int) -> tuple[int, int, int]:
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


def numbers(
    q: Tensor, v: Tensor, decay: Tensor | None, sequences: int, scale: float, block: int, parts: tuple[int, int, int]
) -> list[int]:
    """What a `Call` of recurrence.h consists of; `parts` is the `division`."""
    (b, t, h, dv), (g, dk) = v.shape, q.shape[2:]
    kind = KINDS[None if decay is None else decay.dim()]
    return [parts[0], sequences, b * t, t, g, h, dk, dv, block, kind, *parts[1:], native.bits(scale)]


def views(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """The arguments in common, in one dtype, and where sequences start and end."""
    wide = accumulate_dtype(v.dtype)
    if decay is not None:
        decay = decay.to(wide)
        # A scalar decay is read with any strides.
        decay = unit_stride(decay) if decay.dim() == 4 else decay.expand(v.shape[:3])
    return (
        unit_stride(q.to(wide)),
        unit_stride(k.to(wide)),
        unit_stride(v.to(wide)),
        decay,
        None if initial_state is None else initial_state.to(wide).contiguous(),
        native.segments(v.shape[0], v.shape[1], cu_seqlens, block),
    )


def outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the output, the final state and the states at the starts of all blocks but the first."""
    (b, t, h, dv), dk = v.shape, q.shape[-1]
    wide = accumulate_dtype(v.dtype)
    n = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = 0 if not train else b * ((t - 1) // block) if cu_seqlens is None else t // block
    return (
        v.new_empty(b, t, h, dv),
        v.new_empty(n, h, dk, dv, dtype=wide),
        v.new_empty(blocks, h, dk, dv, dtype=wide),
    )


def shares(count: int, like: Tensor, dtype: torch.dtype, *sequences: int) -> Tensor:
    """For as many shares in a gradient, which are added up by `joined`: so threads do not decide on the order."""
    shape = (*sequences, *like.shape)
    return like.new_empty(shape if count == 1 else (count, *shape), dtype=dtype)


def joined(shares: Tensor, like: Tensor) -> Tensor:
    """The sum of the shares in a gradient, in the dtype of what it is the gradient of."""
    more = shares.dim() - like.dim()
    return (shares.sum(tuple(range(more))) if more else shares).to(like.dtype)
