"""Kernels in C++ for CPUs, compiled on first use and kept in the user's cache.

A kernel is `<op>/native.cpp`, which stands on `native.h` and knows nothing of torch: it is handed addresses and
strides. So a compilation takes seconds, serves every version of torch, and needs nothing but g++. It happens when a
call that the kernel could serve is first made or explained.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.cache import cache_folder
from ..utils.files import one_at_a_time
from ..utils.log import logger_of
from ..utils.modes import constant_in_graphs, outliving_modes
from ..utils.private_torch import differentiates_forward, dispatch_modes, innermost_transform, tracing_state
from .common.checks import check_edges

# No -ffast-math: what is not a number must stay none.
FLAGS = tuple("-std=gnu++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split())
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128})
_HERE = Path(__file__).parent
_SECONDS = 600
NO_COMPILER = "no C++ compiler is installed (apt-get install g++)"

logger = logger_of(__name__)
_libraries: dict[str, ctypes.CDLL] = {}


def machine_refusal() -> str | None:
    """Why this machine can have no native kernel at all; None where it can. Compiles nothing."""
    if sys.platform != "linux":
        return f"native kernels are built on Linux only, and this is {sys.platform}"
    if shutil.which("g++") is None:
        return NO_COMPILER
    return None


def native_refusal(op: str) -> Callable[[Mapping[str, Any]], str | None]:
    """The `refuse` of an op's native backend.

    It compiles the kernel where that was not done before: only then is it known whether the call can be served.
    """

    def refuse(arguments: Mapping[str, Any]) -> str | None:
        tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
        for x in tensors:
            if x.device.type != "cpu":
                return f"it serves CPUs, and the tensors are on {', '.join(sorted({x.device.type for x in tensors}))}"
        if tensors[0].dtype not in DTYPES:
            return f"it does not serve {tensors[0].dtype}"
        return _failure(op)

    return refuse


def step_refusal(op: str) -> Callable[[Mapping[str, Any]], str | None]:
    """The `refuse` of a native backend whose `limits` are `direct_limits`, which have seen to devices."""
    return lambda arguments: None if op in _libraries else _failure(op)


@constant_in_graphs
def _failure(op: str) -> str | None:
    # Looking for a compiler takes longer than many a call.
    return None if op in _libraries else machine_refusal() or _build(op)


def direct_limits(arguments: Iterable[Any], *, cpu: bool = True) -> str | None:
    """Why a kernel may not be called on these tensors at once, without torch's dispatcher; None where it may.

    A custom op takes longer than the work of a decoding step. Without it no gradient is computed, and nobody is served
    who listens to the dispatcher: no compiler or tracer, no mode, no transform of torch.func, no forward derivative, no
    autocast, no class of tensors. `cpu`: whether it takes tensors on CPUs only.
    """
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    gradients = torch.is_grad_enabled()
    for x in arguments:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            if isinstance(x, Tensor):
                return f"it takes plain tensors, and one is a {kind.__name__}"
        elif cpu and not x.is_cpu:
            return f"it serves CPUs, and a tensor is on {x.device.type}"
        elif gradients and x.requires_grad:
            return "it computes no gradients, and a tensor requires one"
        elif x.is_neg():
            return "it takes plain tensors, and one is a lazy negation"
    if dispatch_modes() or torch.is_autocast_enabled("cpu"):
        return "it cannot serve a dispatch mode or autocast"
    if tracing_state() is not None or innermost_transform() is not None:
        return "it cannot be traced by torch.jit or transformed by torch.func"
    if differentiates_forward():
        return "it computes no forward derivatives"
    return None


def direct(*tensors: Tensor | None) -> bool:
    """Whether a native backend may leave out the custom op around its C++ function (see `direct_limits`)."""
    return direct_limits(tensors) is None


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kept = ("flags", "Features", "model name", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _sources(op: str) -> tuple[Path, ...]:
    return _HERE / op / "native.cpp", _HERE / "native.h", *sorted((_HERE / "common").glob("*.h"))


def _key(op: str, compiler: str) -> str:
    binary = Path(compiler).resolve()
    parts = [*(s.read_text() for s in _sources(op)), *FLAGS, _processor(), str(binary), str(binary.stat().st_mtime_ns)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _build(op: str) -> str | None:
    """Loads the op's library, compiled before or now; returns the reason where that fails."""
    compiler = shutil.which("g++")
    if compiler is None:
        return NO_COMPILER
    try:
        library = cache_folder("native") / f"{op}-{_key(op, compiler)}.so"
        if not library.exists():
            # Of several processes that start together one compiles, and the others wait for it.
            with one_at_a_time(library):
                if not library.exists() and (failure := _compile(op, compiler, library)):
                    return failure
        _libraries[op] = ctypes.CDLL(str(library))
    except OSError as error:
        return f"its compiled kernel could not be stored or loaded: {error}"
    return None


def _compile(op: str, compiler: str, library: Path) -> str | None:
    logger.info("omnimix: compiling the native kernels of %s, once (some seconds) ...", op)
    # Under a name of its own first: another process must never load half a library.
    handle, scratch = tempfile.mkstemp(prefix=f"{op}-", suffix=".part", dir=library.parent)
    os.close(handle)
    command = [compiler, *FLAGS, str(_sources(op)[0]), "-o", scratch]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            return f"g++ failed: {lines[-1] if lines else f'exit status {run.returncode}'}"
        os.replace(scratch, library)
    except subprocess.TimeoutExpired:
        return f"g++ took longer than {_SECONDS} s"
    finally:
        Path(scratch).unlink(missing_ok=True)
    return None


def call(op: str, function: str, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
    """Runs `function` of the op's library.

    Args:
        op: its backend has not refused the call, so that the library is loaded.
        function: a C function that takes an array of views and one of int64.
        tensors: one view each, None as a null address; inputs have neighbouring elements in their last dimension.
        numbers: sizes and options; the number of threads is put in front.
    """
    flat = [word for x in tensors for word in _view(x)]
    # Bytes are passed by their address; arrays of ctypes take three times as long to make.
    views = struct.pack(f"{len(flat)}q", *flat)
    values = struct.pack(f"{len(numbers) + 1}q", torch.get_num_threads(), *numbers)
    getattr(_libraries[op], function)(views, values)


def bits(x: float) -> int:
    """A double among a call's numbers."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _view(x: Tensor | None) -> tuple[int, ...]:
    """What native.h calls a View: a tensor's address and the strides of its first dimensions, in elements."""
    if x is None:
        return (0, 0, 0, 0)
    return (x.data_ptr(), *x.stride(), 0, 0, 0)[:4]


def suffix(dtype: torch.dtype) -> str:
    """How the C functions for a dtype end."""
    return {
        torch.float32: "float",
        torch.float64: "double",
        torch.complex64: "complex_float",
        torch.complex128: "complex_double",
    }[dtype]


@functools.lru_cache(maxsize=256)
def _rows(batch: int, length: int, chunks: int) -> Tensor:
    """`segments` of a batch; decoding asks for the same ones at every step."""
    with outliving_modes():
        row = torch.arange(batch)
        return torch.stack([row, torch.zeros_like(row), torch.full_like(row, length), row * chunks], dim=1)


def segments(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int) -> Tensor:
    """The sequences of a call: rows (batch row, first step, end, number of the sequence's first chunk), int64.

    Packed sequences may leave numbers of chunks unused; there are at most length // chunk + sequences of them.
    """
    if cu_seqlens is None:
        return _rows(batch, length, -(-length // chunk))
    # Looked at once more: a compiled graph has no door.
    check_edges(cu_seqlens.tolist(), length)
    edges = cu_seqlens.to(torch.int64)
    start, number = edges[:-1], torch.arange(edges.shape[0] - 1, device=edges.device)
    return torch.stack([torch.zeros_like(start), start, edges[1:], start // chunk + number], dim=1)
