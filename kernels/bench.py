"""Times the kernels beside each other and beside softmax attention: `omnimix bench kernels`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError, UnknownName
from .check import call_of, cast, differentiable
from .registry import Case, Draw, Op, get_op, ops
from .tools import interpreting

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The reference walks step by step: beyond this it would take most of the time of the whole table.
REFERENCE_STEPS = 2048
# Once a measurement has taken so many seconds it is not repeated further.
ENOUGH = 5.0
GEMM = 1536
PEER = "sdpa"


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Medians on one device.

    Args:
        device: where the tensors are.
        repeats: calls that are timed, after one or more that are not.
    """

    device: torch.device
    repeats: int

    def milliseconds(self, call: Callable[[], Any]) -> float:
        self._once(call)
        taken, spent = [], 0.0
        while len(taken) < self.repeats and spent < ENOUGH:
            taken.append(self._once(call))
            spent += taken[-1]
        return statistics.median(taken) * 1e3

    def _once(self, call: Callable[[], Any]) -> float:
        self._finish()
        start = time.perf_counter()
        call()
        self._finish()
        return time.perf_counter() - start

    def _finish(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def gemm_rate(watch: Stopwatch, dtype: torch.dtype) -> float:
    """GFLOP/s of one large square product on the device: what a kernel of matrix products can reach at most."""
    a, b = (torch.randn(GEMM, GEMM, device=watch.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * GEMM**3 / watch.milliseconds(lambda: torch.mm(a, b, out=out)) / 1e6


def softmax_attention(*, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_arguments(arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """Arguments of causal attention on as many steps, heads and channels; None where the op has no heads of values."""
    v = arguments.get("v")
    if v is None or v.dim() != 4:
        return None
    b, t, h, dv = v.shape
    return {name: torch.randn(b, h, t, dv, device=v.device).to(v.dtype) for name in ("q", "k", "v")}


def passes(call: Callable[..., Any], arguments: dict[str, Any], watch: Stopwatch) -> dict[str, float]:
    """Milliseconds of a forward pass, and of one with the gradients of every floating-point argument."""
    names = differentiable(arguments)
    leaves = arguments | {name: arguments[name].detach().requires_grad_() for name in names}

    def first(outputs: Any) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple | list) else outputs

    with torch.no_grad():
        forward = watch.milliseconds(lambda: call(**arguments))
        weight = torch.randn_like(first(call(**arguments)))

    def both() -> None:
        torch.autograd.grad(first(call(**leaves)), [leaves[name] for name in names], weight, allow_unused=True)

    return {"forward": forward, "forward+backward": watch.milliseconds(both)}


@dataclass(kw_only=True)
class Bench:
    """Collects the rows of the table.

    Args:
        watch: takes the times.
        dtype: of all floating-point arguments.
        rate: GFLOP/s of a large matrix product, of which the kernels' rates are shares.
        rows: the table so far.
    """

    watch: Stopwatch
    dtype: torch.dtype
    rate: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def case(self, op: Op, case: Case, length: int, backends: Sequence[str], peer: bool) -> None:
        """One row a backend and pass, and the peer's."""
        arguments = case.bench(Draw.seeded(length, device=self.watch.device, dtype=torch.float32), length)
        arguments = cast(arguments, self.dtype)
        flops = None if op.flops is None else op.flops(arguments)
        found = {name: times for name in backends if (times := self._times(op, name, arguments, length))}
        reference = found.get("reference", {})
        for name, times in found.items():
            self._add(op.name, case.name, name, length, times, flops, reference)
        other = attention_arguments(arguments) if peer and op.name != "attention" else None
        if other is not None:
            b, h, t, dv = other["v"].shape
            times = passes(softmax_attention, other, self.watch)
            self._add("attention", f"beside {case.name}", PEER, length, times, 2.0 * b * h * t * t * dv, {})

    def _times(self, op: Op, backend: str, arguments: dict[str, Any], length: int) -> dict[str, float] | None:
        if (backend == "reference" and length > REFERENCE_STEPS) or (backend == "triton" and interpreting()):
            return None
        try:
            return passes(call_of(op, backend), arguments, self.watch)
        except BackendUnavailable:
            return None

    def _add(
        self,
        op: str,
        case: str,
        backend: str,
        length: int,
        times: dict[str, float],
        flops: float | None,
        reference: dict[str, float],
    ) -> None:
        for name, taken in times.items():
            # Of a backward pass only the time is known: how much is computed again is the backend's affair.
            rate = flops / taken / 1e6 if flops and name == "forward" else None
            self.rows.append(
                {
                    "op": op,
                    "case": case,
                    "backend": backend,
                    "pass": name,
                    "T": length,
                    "ms": round(taken, 3),
                    "GFLOP/s": None if rate is None else round(rate, 1),
                    "of GEMM": None if rate is None else round(rate / self.rate, 3),
                    "x reference": round(reference[name] / taken, 1) if name in reference else None,
                }
            )


def bench_all(
    *,
    ops_named: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 2048, 8192),
    backends: Sequence[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 7,
) -> tuple[list[dict[str, Any]], float]:
    """Times every op that has cases for it, each backend that serves them, at each length.

    Args:
        ops_named: the ops; all by default.
        lengths: steps in time.
        backends: names of backends, and "sdpa" for softmax attention of the same heads; all by default.
        dtype: of the arguments.
        device: "cpu", "cuda", ...
        repeats: calls whose median is taken.

    Returns:
        The rows, and the GFLOP/s of a large matrix product, measured first.

    Raises:
        UnknownName: no such op, backend or dtype.
        ConfigError: a length or number of repeats below 1.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if min([repeats, *lengths]) < 1:
        raise ConfigError(f"repeats {repeats} and lengths {list(lengths)} must be at least 1")
    chosen = ops() if ops_named is None else tuple(get_op(name) for name in ops_named)
    known = {b.name for op in chosen for b in op.backends} | {PEER}
    for name in backends or ():
        if name not in known:
            raise UnknownName("backend", name, known)
    pairs = [(op, case, t) for op in chosen for case in op.cases() if case.bench is not None for t in lengths]
    watch = Stopwatch(device=torch.device(device), repeats=repeats)
    bench = Bench(watch=watch, dtype=DTYPES[dtype], rate=gemm_rate(watch, DTYPES[dtype]))
    from rich.console import Console
    from rich.progress import track

    for op, case, length in track(pairs, description="bench", console=Console(stderr=True), transient=True):
        names = [b.name for b in op.backends if backends is None or b.name in backends]
        bench.case(op, case, length, names, peer=backends is None or PEER in backends)
    return bench.rows, bench.rate


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Time over length, one panel an op's case with its peer, one line a backend and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r["op"], r["case"]) for r in rows if r["backend"] != PEER))
    columns = min(3, len(panels))
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / columns), columns, squeeze=False, figsize=(5 * columns, 4), layout="constrained"
    )
    for axis, (op, case) in zip(axes.flat, panels, strict=False):
        shown = [r for r in rows if (r["op"], r["case"]) in {(op, case), ("attention", f"beside {case}")}]
        for backend, direction in dict.fromkeys((r["backend"], r["pass"]) for r in shown):
            line = [(r["T"], r["ms"]) for r in shown if (r["backend"], r["pass"]) == (backend, direction)]
            style = "-" if direction == "forward" else "--"
            axis.plot(*zip(*sorted(line), strict=True), style, marker="o", label=f"{backend}, {direction}")
        axis.set(title=f"{op}: {case}", xlabel="steps", ylabel="ms", xscale="log", yscale="log")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench kernels`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="omnimix bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192], metavar="T", help="steps in time")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help=f"only these; {PEER} is softmax attention")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the arguments")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="threads that torch may use on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="calls whose median is taken")
    parser.add_argument("--json", metavar="FILE", help='write the rows to FILE ("-": standard output)')
    parser.add_argument("--plot", metavar="FILE.png", help="draw time over length")
    options = parser.parse_args(argv)
    from ..console import emit

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows, rate = bench_all(
        ops_named=options.ops,
        lengths=options.lengths,
        backends=options.backends,
        dtype=options.dtype,
        device=options.device,
        repeats=options.repeats,
    )
    where = f"{options.device}, {torch.get_num_threads()} threads" if options.device == "cpu" else options.device
    emit(
        f"kernels in {options.dtype} on {where}; a large matrix product runs at {rate:.0f} GFLOP/s", rows, options.json
    )
    if options.plot and rows:
        plot(rows, options.plot)
    return 0
