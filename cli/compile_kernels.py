"""Compiles the Triton kernels ahead of time, without a GPU: `omnimix kernels compile`.

The public functions run forward and backward on meta tensors. Triton's driver is replaced by one that only names the
target, so each launch is compiled with the arguments, strides and configs that it would have there, and none is run.
What the compiler reports is a table; a kernel that spills registers or needs more shared memory than its target has is
a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..errors import BackendUnavailable, UnknownName
from ..kernels.common.tools import interpreting, launching_ahead
from ..kernels.registry import Case, Draw, get_op, ops
from ..utils.log import logger_of, progress
from ..utils.options import add_json
from .check_kernels import is_for
from .private_triton import active_driver


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU architecture.

    Args:
        backend: Triton's name of its compiler, "cuda" or "hip".
        architecture: as Triton takes it: a compute capability, or AMD's name.
        warp: threads in a warp.
        shared: bytes of shared memory that one program may use.
    """

    backend: str
    architecture: int | str
    warp: int
    shared: int


# Shared memory per block: CUDA C++ programming guide, table of technical specifications; LDS: AMD's ISA documents.
TARGETS = {
    "sm_80": Target(backend="cuda", architecture=80, warp=32, shared=163 * 1024),
    "sm_86": Target(backend="cuda", architecture=86, warp=32, shared=99 * 1024),
    "sm_89": Target(backend="cuda", architecture=89, warp=32, shared=99 * 1024),
    "sm_90": Target(backend="cuda", architecture=90, warp=32, shared=227 * 1024),
    "sm_100": Target(backend="cuda", architecture=100, warp=32, shared=227 * 1024),
    "sm_120": Target(backend="cuda", architecture=120, warp=32, shared=99 * 1024),
    "gfx942": Target(backend="hip", architecture="gfx942", warp=64, shared=64 * 1024),
    "gfx950": Target(backend="hip", architecture="gfx950", warp=64, shared=160 * 1024),
}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _NoDevice:
    """A Triton driver that names a target and has no device."""

    def __init__(self, target: Any):
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # Triton caches kernels by device: one number for two targets would give back the first target's kernel.
        return hash((self._target.backend, self._target.arch))

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        return lambda function, **_: [0.0, 0.0, 0.0]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One compilation: the kernel's name, its config, the seconds taken, and Triton's kernel or the error."""

    name: str
    config: str
    seconds: float
    kernel: Any
    error: str | None = None


def _config(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None and name != "num_ctas")


@contextlib.contextmanager
def compile_only(target: Target) -> Iterator[list[Compiled]]:
    """Within it, every Triton launch is compiled for `target` in all its configs, recorded in the list, and not run.

    Raises:
        BackendUnavailable: Triton is missing, or its interpreter is switched on.
    """
    if interpreting():
        raise BackendUnavailable("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.errors import TritonError
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise BackendUnavailable(f"triton is not installed or too old ({error}); pip install 'triton>=3.5'") from error

    seen: list[Compiled] = []
    run = JITFunction.run

    def compile_launch(self, *args, grid, warmup=False, **kwargs):
        start = time.perf_counter()
        kernel, error = None, None
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except (TritonError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}".strip().splitlines()[0]
        seconds = time.perf_counter() - start
        config = _config({k: v for k, v in kwargs.items() if k in {"num_warps", "num_stages"}})
        seen.append(Compiled(name=self.__name__, config=config, seconds=seconds, kernel=kernel, error=error))

    def every_config(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())
            seen[-1] = replace(seen[-1], config=_config(config.all_kwargs()))
        self.nargs = None

    with (
        active_driver(_NoDevice(GPUTarget(target.backend, target.architecture, target.warp))),
        mock.patch.object(JITFunction, "run", compile_launch),
        mock.patch.object(Autotuner, "run", every_config),
        launching_ahead(),
    ):
        yield seen


def usage(kernel: Any, target: Target) -> dict[str, Any]:
    """Registers, spilled registers, bytes of stack, and the matrix instruction of a compiled kernel."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        count = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        # Scalar registers spill into lanes of vector registers, not into memory: those do not count.
        return {
            "registers": count["vgpr_count"],
            "spills": count["vgpr_spill_count"],
            "stack": count["private_segment_fixed_size"],
            "mma": "mfma" if "v_mfma" in text else "",
        }
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", report)[0])
    kinds = [kind for kind in ("wgmma", "tcgen05", "mma.sync") if kind in kernel.asm["ptx"]]
    # Spills are counted when a driver loads the kernel; before, the stack shows them, which we use for nothing else.
    return {"registers": registers, "spills": stack // 4, "stack": stack, "mma": " ".join(kinds)}


def row_of(compiled: Compiled, target: Target) -> dict[str, Any]:
    """What is reported of a compilation; `problem` is empty where the kernel fits the target."""
    row = {"kernel": compiled.name, "config": compiled.config}
    if compiled.error is not None:
        row |= {"registers": None, "spills": None, "stack": None, "mma": None, "shared": None}
        problem = compiled.error
    else:
        shared = compiled.kernel.metadata.shared
        row |= usage(compiled.kernel, target) | {"shared": shared}
        problem = "; ".join(
            text
            for text, wrong in (
                (f"{row['spills']} registers spilled", row["spills"]),
                (f"{row['stack']} bytes of stack", row["stack"] and not row["spills"]),
                (f"needs {shared} bytes of shared memory", shared > target.shared),
            )
            if wrong
        )
    return row | {"shared limit": target.shared, "seconds": compiled.seconds, "problem": problem}


def call_on_meta(function: Any, arguments: dict[str, Any], *, backward: bool = True) -> None:
    """Runs an op forward, and backward with gradients to every floating-point or complex tensor of its arguments."""
    if not backward:
        function(**arguments, backend="triton")
        return
    leaves = {
        name: a.requires_grad_() if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) else a
        for name, a in arguments.items()
    }
    outputs = function(**leaves, backend="triton")
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


def _compile_case(name: str, case: Case, target: Target, dtype: torch.dtype) -> list[Compiled]:
    """Every launch of a case; none where it has no arguments for a GPU."""
    if case.compile is None:
        return []
    arguments = case.compile(Draw.seeded(device="meta", dtype=dtype))
    with compile_only(target) as seen:
        op = get_op(name)
        call_on_meta(op.function, arguments, backward=is_for(op, "triton", arguments))
    if not seen:
        raise BackendUnavailable(
            f"{name}, case {case.name!r}: no kernel was launched on meta tensors; "
            "decorate the custom op's register_fake function with tools.launches"
        )
    return seen


def compile_all(
    targets: Sequence[str] = DEFAULT_TARGETS,
    names: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bf16",),
) -> list[dict[str, Any]]:
    """Compiles every op that has a Triton backend, forward and backward, for each target.

    Args:
        targets: names out of `TARGETS`.
        names: the ops; all by default.
        dtypes: "bf16", "fp16" or "fp32".

    Returns:
        One row for each kernel, target and config, once where several cases launch the same: op, case, dtype, target,
        kernel, config, registers, spills, stack, mma, shared, shared limit, seconds, problem (empty where all is well).

    Raises:
        UnknownName: a target, op or dtype that is not known.
        BackendUnavailable: Triton is missing or interpreted, or an op launches no kernel on meta tensors.
    """
    for kind, given, known in (("compile target", targets, TARGETS), ("dtype", dtypes, DTYPES)):
        for name in given:
            if name not in known:
                raise UnknownName(kind, name, known)
    chosen = ops() if names is None else [get_op(name) for name in names]
    chosen = [op for op in chosen if any(backend.name == "triton" for backend in op.backends)]
    calls = [
        (op, case, dtype, target) for op in chosen for case in op.cases() for dtype in dtypes for target in targets
    ]
    rows, known = [], set()
    with progress(logger_of(__name__), "compiling kernels", len(calls)) as advance:
        for op, case, dtype, target in calls:
            for compiled in _compile_case(op.name, case, TARGETS[target], DTYPES[dtype]):
                key = (target, compiled.name, compiled.config, getattr(compiled.kernel, "hash", compiled.error))
                if key not in known:
                    known.add(key)
                    first = {"op": op.name, "case": case.name, "dtype": dtype, "target": target}
                    rows.append(first | row_of(compiled, TARGETS[target]))
            advance(1)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="omnimix kernels compile",
        description="Compile the Triton kernels ahead of time, and report registers, spills and shared memory. "
        "Exit code 1 if a kernel spills, does not fit or does not compile.",
    )
    parser.add_argument("--targets", default=",".join(DEFAULT_TARGETS), help=f"comma-separated: {', '.join(TARGETS)}")
    parser.add_argument("--ops", help="comma-separated names of ops (default: all)")
    parser.add_argument("--dtype", default="bf16", help=f"comma-separated: {', '.join(DTYPES)} (default: bf16)")
    add_json(parser)
    options = parser.parse_args(argv)
    from ..utils.console import emit

    names = None if options.ops is None else options.ops.split(",")
    rows = compile_all(options.targets.split(","), names, options.dtype.split(","))
    emit("ahead-of-time compilation", rows, options.json)
    return 1 if any(row["problem"] for row in rows) else 0
