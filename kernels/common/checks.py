"""Checks at the doors of the ops: what passes them cannot make a kernel leave its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...errors import UnsupportedShape


def check_boundaries(cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    """Raises UnsupportedShape for boundaries that do not cut one row of `length` steps into sequences.

    Their values are looked at where they are at hand: on a CPU, and not while a call is traced. A GPU would have to be
    waited for.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise UnsupportedShape(f"cu_seqlens: shape {tuple(cu_seqlens.shape)} is not (sequences + 1,)")
    if cu_seqlens.dtype != torch.int32 and cu_seqlens.dtype != torch.int64:
        raise UnsupportedShape(f"cu_seqlens: dtype {cu_seqlens.dtype} is neither int32 nor int64")
    if batch != 1:
        raise UnsupportedShape(f"cu_seqlens: packed sequences need batch 1, not {batch}")
    if _at_hand(cu_seqlens):
        check_edges(cu_seqlens.tolist(), length)


def _at_hand(x: Tensor) -> bool:
    """Whether a tensor's values can be read at once, by nobody who records what is done with it."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def check_edges(edges: Sequence[int], length: int) -> None:
    """Raises UnsupportedShape unless values of `cu_seqlens` ascend from 0 to `length`; empty sequences are legal."""
    if edges[0] != 0 or edges[-1] != length or any(a > b for a, b in pairwise(edges)):
        shown = str(list(edges)) if len(edges) <= 8 else f"[{edges[0]}, {edges[1]}, ..., {edges[-2]}, {edges[-1]}]"
        raise UnsupportedShape(f"cu_seqlens: {shown} must start with 0, never descend, and end with the {length} steps")


def check_matrix_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """What `gated_linear` and `delta_rule` ask of the arguments that they share; raises UnsupportedShape."""
    b, t, h, dv = v.shape
    g, dk = q.shape[2:]
    if q.shape != k.shape or q.shape[:2] != (b, t):
        raise UnsupportedShape(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be equal and start with v's {(b, t)}")
    if g < 1 or h % g:
        raise UnsupportedShape(f"q: its {g} heads must divide v's {h} heads")
    if decay is not None and not (has_shape(decay, h) or has_shape(decay, b, t, h) or has_shape(decay, b, t, h, dk)):
        raise UnsupportedShape(f"decay: shape {tuple(decay.shape)} is none of {(h,)}, {(b, t, h)}, {(b, t, h, dk)}")
    check_boundaries(cu_seqlens, b, t)
    check_state(initial_state, b, cu_seqlens, h, dk, dv)


def has_shape(x: Tensor, *sizes: int) -> bool:
    """Whether x has this shape; a size is only compared with its own, which torch.export takes for a constraint.

    Nor is the shape looked up in a set: a symbolic size has no hash.
    """
    return x.ndim == len(sizes) and x.shape == sizes


def check_state(initial_state: Tensor | None, batch: int, cu_seqlens: Tensor | None, *sizes: int) -> None:
    """Raises UnsupportedShape for a state that is not of `sizes` for each sequence."""
    wanted = (sequences(batch, cu_seqlens), *sizes)
    if initial_state is not None and initial_state.shape != wanted:
        raise UnsupportedShape(f"initial_state: shape {tuple(initial_state.shape)} is not {wanted}")


def sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """The sequences of a call: the rows of the batch, or the packed ones."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def untouched(arguments: dict, like: Tensor, dtype: torch.dtype, *sizes: int) -> Tensor:
    """The final state of a call without tokens: the initial one, or zeros, in `dtype`.

    Args:
        arguments: the call's, of which `initial_state` and `cu_seqlens` are read.
        like: its rows are the batch, and its device the state's.
        dtype: the state's.
        sizes: of the state of one sequence.
    """
    if arguments["initial_state"] is not None:
        return arguments["initial_state"].to(dtype)
    return like.new_zeros(sequences(like.shape[0], arguments["cu_seqlens"]), *sizes, dtype=dtype)
