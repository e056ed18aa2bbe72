"""Compares every backend of every op with the definition in float64: `omnimix kernels check`.

The laws in tests/laws stand on the same functions.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..kernels.common.tools import interpreting
from ..kernels.registry import Case, Draw, Op, complex_of, get_op, ops
from ..utils.devices import usable_device
from ..utils.options import add_device, add_json, summary

# Relative to the largest element of the true tensor.
FLOAT32_TOLERANCE = 5e-5
# An error of half a unit in bfloat16's last place, relative to the root mean square of the true tensor.
BFLOAT16_TINY = 2.0**-9


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a call gives, and the gradients of a random weighting of it."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        outputs = {f"output {i}": output for i, output in enumerate(self.outputs)}
        return outputs | {f"gradient of {name}": g for name, g in self.gradients.items()}

    def to(self, dtype: torch.dtype) -> Results:
        return Results(
            outputs=tuple(to(o, dtype) for o in self.outputs),
            gradients={name: to(g, dtype) for name, g in self.gradients.items()},
        )


def arguments_of(
    case: Case,
    draw: Draw,
    batch: int,
    time: int,
    *,
    state: bool = True,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The keyword arguments of one call: the case's, with its initial state and the sequence offsets of packed ones."""
    arguments = case.make(draw, batch, time)
    if state and case.state is not None:
        arguments["initial_state"] = case.state(draw, batch if lengths is None else len(lengths))
    if lengths is not None:
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arguments["cu_seqlens"] = borders.to(draw.device)
    return arguments


def differentiable(arguments: dict[str, Any]) -> list[str]:
    return [
        name for name, a in arguments.items() if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())
    ]


def weights_for(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The random weights by which `results` sums outputs into a loss, the same for every backend and dtype."""
    draw = Draw.seeded(seed + 1)

    def weight(o: Tensor) -> Tensor:
        made = draw.complex_normal(*o.shape) if o.is_complex() else draw.normal(*o.shape)
        return made.to(device=o.device, dtype=o.dtype)

    return [weight(o) for o in outputs]


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a floating-point dtype, or in the complex one that goes with it."""
    return x.to(complex_of(dtype) if x.is_complex() else dtype)


def _wide(x: Tensor) -> Tensor:
    return to(x, torch.float64)


def results(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    seed: int = 0,
    backward: bool = True,
    weights: Sequence[Tensor] | None = None,
) -> Results:
    """Calls `function` and differentiates it with respect to every floating-point tensor among its arguments.

    Args:
        function: gives one tensor or several.
        arguments: its keyword arguments; strides are kept.
        seed: of the weights that make a loss of the outputs.
        backward: whether gradients are taken.
        weights: to use instead, one per output.
    """
    names = differentiable(arguments)
    leaves = {name: arguments[name].detach().requires_grad_(backward) for name in names}
    outputs = function(**(arguments | leaves))
    outputs = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
    gradients = {}
    if backward:
        weights = weights_for(outputs, seed) if weights is None else weights
        parts = [(o * w).real.sum() if o.is_complex() else (o * w).sum() for o, w in zip(outputs, weights, strict=True)]
        loss = functools.reduce(torch.add, parts)
        # A loss on which nothing acts has gradients too: zeros, which a comparison then finds.
        connected = names if loss.requires_grad else []
        found = torch.autograd.grad(loss, [leaves[n] for n in connected], allow_unused=True) if connected else ()
        gradients = {name: torch.zeros_like(leaves[name]) for name in names}
        gradients |= {name: g for name, g in zip(connected, found, strict=True) if g is not None}
    return Results(outputs=tuple(o.detach() for o in outputs), gradients=gradients)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest deviation, relative to the largest true element (0.1 where all are smaller); infinite for NaN."""
    if found.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    deviation = (_wide(found) - _wide(truth)).abs().max().item()
    return deviation / max(truth.abs().max().item(), 0.1) if deviation == deviation else float("inf")


def rms(x: Tensor) -> float:
    return _wide(x).abs().square().mean().sqrt().item() if x.numel() else 0.0


def low_precision_excess(found: Tensor, plain: Tensor, truth: Tensor) -> float:
    """By how much a bfloat16 result is worse than allowed: at most 1 where it is within twice plain torch's error.

    Args:
        found: the result of a backend on bfloat16 inputs.
        plain: the true result on the inputs rounded to bfloat16, itself rounded.
        truth: the true result on the unrounded inputs.
    """
    deviation = rms(_wide(found) - _wide(truth))
    allowed = 2 * rms(_wide(plain) - _wide(truth)) + BFLOAT16_TINY * max(rms(truth), 0.1)
    return deviation / allowed if deviation == deviation else float("inf")


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    names = differentiable(arguments)
    return arguments | {name: to(arguments[name], dtype) for name in names}


def call_of(op: Op, backend: str) -> Callable[..., Any]:
    """The op's public function with the backend named."""
    function = op.function

    def call(**arguments: Any) -> Any:
        return function(**arguments, backend=backend)

    return call


def is_for(op: Op, backend: str, arguments: dict[str, Any], *, backward: bool = True) -> bool:
    """Whether a backend is for such a call, with the gradients of all floating-point arguments or without any."""
    leaves = {name: arguments[name].detach().requires_grad_(backward) for name in differentiable(arguments)}
    return op.backend(backend).limits(op.complete(arguments | leaves)) is None


def _calls(case: Case, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls by which a case is checked, in float64, with their names."""
    draw = Draw.seeded(3, device=device)
    yield "65 steps", arguments_of(case, draw, 2, 65)
    yield "one step", arguments_of(case, draw, 2, 1)
    if case.packed:
        yield "packed", arguments_of(case, draw, 1, 97, lengths=[1, 64, 2, 30])
    if device.type != "cpu" and case.compile is not None:
        yield "large", case.compile(draw)


@dataclass(frozen=True, kw_only=True)
class _Truth:
    call: str
    arguments: dict[str, Any]
    results: dict[torch.dtype, Results]


def _truths(op: Op, case: Case, device: torch.device) -> list[_Truth]:
    """For each call the true results on its inputs, and on these rounded to float32 and bfloat16."""
    reference, made = call_of(op, "reference"), []
    for name, arguments in _calls(case, device):
        found = {torch.float64: results(reference, arguments)}
        weights = weights_for(found[torch.float64].outputs, 0)
        for dtype in (torch.float32, torch.bfloat16):
            rounded = [_wide(to(w, dtype)) for w in weights]
            found[dtype] = results(reference, cast(cast(arguments, dtype), torch.float64), weights=rounded)
        made.append(_Truth(call=name, arguments=arguments, results=found))
    return made


def _compare(
    call: Callable[..., Any], truth: _Truth, dtype: torch.dtype, backward: bool
) -> tuple[float, float, list[str]]:
    """The relative errors of the outputs and of the worst gradient, and the names of the tensors that are wrong."""
    found = results(call, cast(truth.arguments, dtype), backward=backward).named()
    true, plain = truth.results[torch.float64].named(), truth.results[dtype].named()
    errors = {name: error(x, plain[name]) for name, x in found.items()}
    if dtype == torch.bfloat16:
        rounded = truth.results[dtype].to(dtype).named()
        wrong = [n for n, x in found.items() if low_precision_excess(x, rounded[n], true[n]) > 1]
    else:
        wrong = [n for n, e in errors.items() if e > FLOAT32_TOLERANCE]
    outputs = [e for n, e in errors.items() if n.startswith("output")]
    gradients = [e for n, e in errors.items() if n.startswith("gradient")]
    return max(outputs), max(gradients, default=0.0), [f"{n} ({truth.call})" for n in wrong]


def _check(op: Op, case: Case, backend: str, dtype: torch.dtype, truths: list[_Truth]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op.name, "case": case.name, "backend": backend, "dtype": str(dtype)[6:]}
    start = time.perf_counter()
    try:
        # A backend for single steps without gradients is checked on these.
        backward = any(is_for(op, backend, cast(truth.arguments, dtype)) for truth in truths)
        own = [t for t in truths if is_for(op, backend, cast(t.arguments, dtype), backward=backward)]
        if not own:
            return row | {"output": None, "gradient": None, "verdict": "refused: not for these calls", "seconds": 0.0}
        compared = [_compare(call_of(op, backend), truth, dtype, backward) for truth in own]
    except BackendUnavailable as refusal:
        return row | {"output": None, "gradient": None, "verdict": f"refused: {refusal}", "seconds": 0.0}
    except _kernel_failures() as failure:
        seconds = time.perf_counter() - start
        reason = f"FAIL: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        return row | {"output": None, "gradient": None, "verdict": reason, "seconds": seconds}
    outputs, gradients, wrong = zip(*compared, strict=True)
    names = [name for some in wrong for name in some]
    return row | {
        "output": max(outputs),
        "gradient": max(gradients) if backward else None,
        "verdict": f"FAIL: {', '.join(names)}" if names else "ok",
        "seconds": time.perf_counter() - start,
    }


def _kernel_failures() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be compiled or launched raises; one of them must not end the whole table."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


def check_all(
    device: str | torch.device = "cpu",
    ops_named: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Runs every backend of the ops on all their cases and compares outputs and gradients with the definition's.

    In float32, and in bfloat16 where Triton's interpreter (which computes it wrongly) has no part in it. On a CPU
    Triton's backends run only if TRITON_INTERPRET=1 was set before their first use.

    Args:
        device: "cpu", "cuda", ...
        ops_named: the ops; all by default.
        backends: names of the backends; all but "reference" by default.

    Returns:
        One row a comparison: op, case, backend, dtype, the relative error of the outputs and of the worst gradient,
        verdict ("ok", "refused: why", "FAIL: what"), seconds.
    """
    from rich.progress import track

    device = torch.device(device)
    chosen = ops() if ops_named is None else [get_op(name) for name in ops_named]
    pairs = [(op, case) for op in chosen for case in op.cases()]
    rows = []
    for op, case in track(pairs, description="kernels", console=_stderr(), transient=True):
        truths = _truths(op, case, device)
        for backend in op.backends:
            if backend.name not in backends if backends is not None else backend.name == "reference":
                continue
            interpreted = backend.name == "triton" and interpreting()
            for dtype in (torch.float32,) if interpreted else (torch.float32, torch.bfloat16):
                rows.append(_check(op, case, backend.name, dtype, truths))
    return rows


def _stderr():
    from rich.console import Console

    return Console(stderr=True)


def _names(text: str) -> list[str]:
    return text.split(",")


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix kernels check`; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="omnimix kernels check", description=summary(__doc__))
    add_device(parser)
    parser.add_argument("--ops", type=_names, help="comma-separated names of ops (default: all)")
    parser.add_argument("--backends", type=_names, help='comma-separated (default: all but "reference")')
    add_json(parser)
    options = parser.parse_args(argv)
    usable_device(options.device)
    if options.device == "cpu":
        # Read when a kernel is defined, hence before the first backend is loaded.
        os.environ["TRITON_INTERPRET"] = "1"
    from ..utils.console import emit

    with warnings.catch_warnings():
        # Triton's interpreter computes with NumPy, which warns of the infinities and overflows that masks make.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy\.")
        rows = check_all(options.device, options.ops, options.backends)
    emit(f"kernels against their definition, on {options.device}", rows, options.json)
    return int(any(row["verdict"].startswith("FAIL") for row in rows))
