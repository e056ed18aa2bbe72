"""What every Triton kernel of ours shares on the host: when it may run, how it is tuned, what a launch checks.

Importing this module does not import triton; device functions are in `triton_tools`, which only the triton.py files
import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedShape

# Values that change from call to call: a kernel tuned by one of them would be tuned again and again.
LENGTHS = frozenset({"t", "time", "length", "seqlen", "total", "tokens", "chunks", "rows", "n", "b", "batch"})
MOST_CONFIGS = 4
GRID_LIMITS = (2**31 - 1, 65535, 65535)
_ahead: ContextVar[bool] = ContextVar("omnimix_launching_ahead", default=False)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


def triton_refusal(arguments: Mapping[str, Any]) -> str | None:
    """Why Triton cannot serve a call with these arguments; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    devices = {a.device.type for a in arguments.values() if isinstance(a, Tensor)}
    # Meta tensors pass: ahead-of-time compilation runs the launchers on them.
    unusable = devices - ({"cpu", "meta"} if interpreting() else {"cuda", "meta"})
    if unusable:
        return f"Triton needs a GPU, and the tensors are on {', '.join(sorted(unusable))}"
    return None


@contextlib.contextmanager
def launching_ahead() -> Iterator[None]:
    """Within it, custom ops called on meta tensors go through their launchers (see `launches`)."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def launches(launcher: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the `register_fake` function of a custom op whose implementation is `launcher`.

    Fake and meta tensors see the shapes only, except while kernels are compiled ahead of time: then the launcher itself
    runs on meta tensors, so that every launch is compiled with the arguments it would really have.

        @torch.library.custom_op("omnimix::f", mutates_args=())
        def _f(x: Tensor) -> Tensor:
            return _launch_f(x)

        @_f.register_fake
        @launches(_launch_f)
        def _(x):
            return torch.empty_like(x)
    """

    def decorate(shapes: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(shapes)
        def fake(*args: Any, **kwargs: Any) -> Any:
            return (launcher if _ahead.get() else shapes)(*args, **kwargs)

        return fake

    return decorate


def tuned(configs: Sequence[Mapping[str, int]], *, key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorates a `@triton.jit` kernel: on a GPU the fastest of `configs` is found once for each value of `key`.

    Under the interpreter only the first config is kept, where timing means nothing.

    Args:
        configs: at most four; each gives the kernel's tuned constexprs, and `num_warps`, `num_stages` where they differ
            from Triton's defaults.
        key: the kernel's arguments by whose values it is tuned; lengths and batch sizes are not allowed among them.
    """
    if not 1 <= len(configs) <= MOST_CONFIGS:
        raise ValueError(f"configs: {len(configs)} configs; a kernel takes 1 to {MOST_CONFIGS}")
    if lengths := sorted(k for k in key if k.lower() in LENGTHS):
        raise ValueError(f"key: {lengths} would tune the kernel anew for every length; leave them out")
    import triton

    options = ("num_warps", "num_stages")
    made = [
        triton.Config({k: v for k, v in c.items() if k not in options}, **{k: c[k] for k in options if k in c})
        for c in (configs[:1] if interpreting() else configs)
    ]
    return triton.autotune(made, key=list(key))


def dot_mode(dtype: torch.dtype, *, wide: bool = False) -> str:
    """The mode of `triton_tools.dot` for inputs of this dtype, a constexpr of the kernel.

    "bfloat16" and "float16" feed the tensor cores in that dtype; "tf32", "tf32x3" and "ieee" multiply float32 with 11,
    22 and 24 bits; "float64" computes in float64. The interpreter's bfloat16 dot is wrong, so there it is float32 or
    float64.

    Args:
        dtype: the inputs' dtype.
        wide: whether the operands may leave float16's range (states, unnormalised scores).
    """
    if dtype == torch.float64:
        return "float64"
    if interpreting():
        return "ieee"
    if dtype == torch.bfloat16 or (dtype == torch.float16 and not wide):
        return str(dtype).removeprefix("torch.")
    import triton

    # Three TF32 products are as precise as float32 and use NVIDIA's tensor cores; AMD multiplies float32 as it is.
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, sums and normalisers for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile(size: int, largest: int = 128) -> int:
    """The tile that covers `size`, or `largest` where several are needed: a power of two, at least a dot's 16."""
    return min(max(16, 1 << (size - 1).bit_length()), largest)


def unit_stride(x: Tensor) -> Tensor:
    """`x` with neighbouring elements in its last dimension, as our kernels read them; copied where it is not so."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def grid(*sizes: int) -> tuple[int, ...]:
    """A launch grid, checked against the limits of CUDA (the second and third size are at most 65535)."""
    if any(not 1 <= size <= limit for size, limit in zip(sizes, GRID_LIMITS, strict=False)):
        raise UnsupportedShape(f"launch grid {sizes} exceeds {GRID_LIMITS}; split the batch or the heads")
    return sizes


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one during a launch; Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def chunk_table(cu_seqlens: Tensor, size: int, total: int) -> tuple[Tensor, Tensor]:
    """Numbers the chunks of packed sequences, without waiting for the device.

    Args:
        cu_seqlens: (n + 1,) running total of the lengths.
        size: steps in a chunk; the last chunk of a sequence may be shorter.
        total: the sum of the lengths.

    Returns:
        `table` (m, 2) int32: sequence and chunk within it, for each of m = total // size + n chunks, which is as many
        as there can be; rows past the last chunk hold sequence n and are skipped by the kernels.
        `first` (n,) int32: each sequence's first row in the table.
    """
    n = cu_seqlens.shape[0] - 1
    counts = (cu_seqlens.diff() + size - 1) // size
    ends = counts.cumsum(0)
    rows = torch.arange(total // size + n, device=cu_seqlens.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, rows, right=True)
    first = ends - counts
    within = rows - first[sequence.clamp(max=n - 1)]
    return torch.stack([sequence, within], dim=1).to(torch.int32), first.to(torch.int32)
