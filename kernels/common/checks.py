"""Checks at the doors of the ops: what passes them cannot make a kernel leave its tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedShape
from ...utils.modes import observed

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
NUMBERS = FLOATS | {torch.complex64, torch.complex128}
INTEGERS = frozenset({torch.int32, torch.int64})
ANY_RANK, RANK_FROM_1 = range(65), range(1, 65)
# More elements than any memory holds, as an expanded tensor may have: loops would have no end and sizes overflow.
MOST_ELEMENTS = 1 << 40
LARGEST_INT, LARGEST = (1 << 63) - 1, sys.float_info.max
_STRIDED = torch.strided


class Argument(NamedTuple):
    """What an op asks of one of its tensors, whatever the others are.

    Args:
        name: of the parameter.
        ranks: of which its number of dimensions is one.
        dtypes: of which its dtype is one.
        optional: whether it may be None.
    """

    name: str
    ranks: Sequence[int]
    dtypes: frozenset[torch.dtype]
    optional: bool


def _arguments(dtypes: frozenset[torch.dtype], optional: bool, ranks: dict[str, Any]) -> tuple[Argument, ...]:
    return tuple(
        Argument(name, (rank,) if isinstance(rank, int) else rank, dtypes, optional) for name, rank in ranks.items()
    )


def floats(*, optional: bool = False, **ranks: int | Sequence[int]) -> tuple[Argument, ...]:
    """Floating-point arguments by name, with the number of their dimensions, or those among which it is."""
    return _arguments(FLOATS, optional, ranks)


def numbers(*, optional: bool = False, **ranks: int | Sequence[int]) -> tuple[Argument, ...]:
    """`floats` that may be complex."""
    return _arguments(NUMBERS, optional, ranks)


def integers(*, optional: bool = False, **ranks: int | Sequence[int]) -> tuple[Argument, ...]:
    """Arguments of int32 or int64, as `floats`."""
    return _arguments(INTEGERS, optional, ranks)


def check_tensors(op: str, wanted: tuple[Argument, ...], given: tuple[Any, ...]) -> None:
    """Raises UnsupportedShape unless all tensors of a call have a rank and dtype that the op serves, and one device.

    Args:
        op: its name.
        wanted: its tensors; the first one is never None.
        given: the call's, in the same order.
    """
    # A comparison of a symbolic size would be a constraint on it.
    eager = not torch.compiler.is_compiling()
    first = given[0]
    device, cpu = getattr(first, "device", None), getattr(first, "is_cpu", False)
    # It stands before every decoding step, so that all is looked at in one expression.
    for x, (_, ranks, dtypes, optional) in zip(given, wanted, strict=True):
        if x is None and optional:
            continue
        if not (
            isinstance(x, Tensor)
            and x.ndim in ranks
            and x.dtype in dtypes
            and ((cpu and x.is_cpu) or x.device == device)
            and x.layout is _STRIDED
            and not (eager and x.numel() > MOST_ELEMENTS)
        ):
            _refuse(op, wanted, given)


def _refuse(op: str, wanted: tuple[Argument, ...], given: tuple[Any, ...]) -> None:
    """Says which argument it is, and what is wrong with it."""
    first = given[0]
    for x, (name, ranks, dtypes, optional) in zip(given, wanted, strict=True):
        if x is None and optional:
            continue
        if not isinstance(x, Tensor):
            raise UnsupportedShape(f"{name}: {type(x).__name__} is not a tensor, which {op} takes")
        if x.ndim not in ranks:
            few = " or ".join(map(str, ranks)) if len(ranks) < 5 else f"at least {ranks[0]}"
            raise UnsupportedShape(f"{name}: shape {tuple(x.shape)} has {x.ndim} dimensions; {op} takes {few}")
        if x.dtype not in dtypes:
            known = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            raise UnsupportedShape(f"{name}: dtype {x.dtype} is not served by {op}, which takes {known}")
        if x.device != first.device:
            raise UnsupportedShape(
                f"{name}: it is on {x.device}, and {wanted[0].name} on {first.device}; {op} takes tensors of one device"
            )
        if x.layout is not _STRIDED:
            raise UnsupportedShape(f"{name}: layout {x.layout} is not strided; pass {name}.to_dense()")
        if x.numel() > MOST_ELEMENTS:
            raise UnsupportedShape(f"{name}: shape {tuple(x.shape)} has more elements than {op} could ever go through")


def check_whole(
    name: str, value: Any, *, least: int = -LARGEST_INT, most: int = LARGEST_INT, optional: bool = False
) -> None:
    """Raises UnsupportedShape unless an option is a whole number from `least` to `most`; `optional`: or None."""
    if (type(value) is int and least <= value <= most) or (value is None and optional):
        return
    # Symbolic integers are none of Python's.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or not least <= value <= most:
        above = "" if least == -LARGEST_INT else f" of at least {least}"
        raise UnsupportedShape(f"{name}: {value!r} is not a whole number{above}, at most {most}")


def check_real(
    name: str, value: Any, *, least: float | int = -LARGEST, above: float | int = -math.inf, optional: bool = False
) -> None:
    """Raises UnsupportedShape unless an option is a finite number within its bounds; `optional`: or None."""
    if isinstance(value, torch.SymFloat) or (value is None and optional):
        return
    # NaN compares with nothing, and would pass where a comparison refuses.
    if (
        isinstance(value, bool)
        or not isinstance(value, float | int)
        or not (least <= value <= (LARGEST_INT if isinstance(value, int) else LARGEST) and above < value)
    ):
        bound = f" above {above}" if above > -math.inf else f" of at least {least}" if least > -LARGEST else ""
        raise UnsupportedShape(f"{name}: {value!r} is not a finite number{bound}")


def check_flag(name: str, value: Any) -> None:
    """Raises UnsupportedShape unless an option is True or False."""
    if not isinstance(value, bool):
        raise UnsupportedShape(f"{name}: {value!r} is neither True nor False")


def check_boundaries(cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    """Raises UnsupportedShape for boundaries that do not cut one row of `length` steps into sequences.

    Their values are looked at where they are at hand: on a CPU, and not while a call is traced. A GPU would have to be
    waited for.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.shape[0] < 1:
        raise UnsupportedShape(f"cu_seqlens: shape {tuple(cu_seqlens.shape)} is not (sequences + 1,)")
    if batch != 1:
        raise UnsupportedShape(f"cu_seqlens: packed sequences need batch 1, not {batch}")
    if _at_hand(cu_seqlens):
        check_edges(cu_seqlens.tolist(), length)


def _at_hand(x: Tensor) -> bool:
    """Whether a tensor's values can be read at once, by nobody who records what is done with it."""
    return type(x) is Tensor and x.is_cpu and not observed()


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
    scale: float | None,
) -> None:
    """What `gated_linear` and `delta_rule` ask of the arguments that they share; raises UnsupportedShape."""
    check_real("scale", scale, optional=True)
    b, t, h, dv = v.shape
    g, dk = q.shape[2:]
    if dk < 1:
        raise UnsupportedShape(f"q: shape {tuple(q.shape)} has no channels")
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


def untouched(arguments: Mapping[str, Any], like: Tensor, dtype: torch.dtype, *sizes: int) -> Tensor:
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
