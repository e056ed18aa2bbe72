"""Times the kernels, compared with each other and with softmax attention: `omnimix bench kernels`."""

from __future__ import annotations

import ctypes
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
from ..kernels.common.tools import interpreting
from ..kernels.registry import Case, Draw, Op, get_op, ops
from ..utils.console import say
from ..utils.devices import usable_device, where_on
from ..utils.files import replace_file
from ..utils.options import add_device, add_json, add_threads, set_threads, summary
from .bench_kernels_peers import PEERS, Peer, served, times
from .check_kernels import call_of, cast, differentiable

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The reference walks step by step: beyond this it would take most of the time of the whole table.
REFERENCE_STEPS = {"forward": 2048, "forward+backward": 512}
# Once a measurement has taken so many seconds it is not repeated further.
ENOUGH = 5.0
GEMM = 1536
# Beyond any cache.
COPY = 1 << 26
SDPA = "sdpa"
PASSES = ("forward", "forward+backward")


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
        first = self._once(call)
        # What takes so long does not depend on being warm.
        taken, spent = ([first], first) if first > ENOUGH else ([], 0.0)
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


def copy_rate(watch: Stopwatch) -> float:
    """GB/s of copying a large tensor on the device, read and written: what a kernel bound by memory can reach."""
    a = torch.randn(COPY, device=watch.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / watch.milliseconds(lambda: b.copy_(a)) / 1e6


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call holds at a time beyond what was there before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    # Freed memory that the allocator keeps would be used again unseen.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    # proc(5): 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def softmax_attention(*, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_arguments(arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """Arguments of causal attention on as many steps, heads and channels; None where the op has no heads of values."""
    v = arguments.get("v")
    if v is None or v.dim() != 4:
        return None
    b, t, h, dv = v.shape
    return {name: torch.randn(b, h, t, dv, device=v.device).to(v.dtype) for name in ("q", "k", "v")}


def passes(
    call: Callable[..., Any], arguments: dict[str, Any], watch: Stopwatch, *, backward: bool = True
) -> dict[str, Any]:
    """Milliseconds of a forward pass and of one with the gradients of every floating-point argument, and its MB."""
    names = differentiable(arguments)
    leaves = arguments | {name: arguments[name].detach().requires_grad_() for name in names}

    def first(outputs: Any) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple | list) else outputs

    with torch.no_grad():
        forward = watch.milliseconds(lambda: call(**arguments))
        weight = torch.randn_like(first(call(**arguments)))
    if not backward:
        return {"forward": forward}

    def both() -> None:
        torch.autograd.grad(first(call(**leaves)), [leaves[name] for name in names], weight, allow_unused=True)

    taken, peak = watch.milliseconds(both), peak_bytes(both, watch.device)
    return {"forward": forward, "forward+backward": taken, "MB": None if peak is None else peak / 1e6}


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """What the device does at most: GFLOP/s of a large matrix product, and GB/s of a large copy."""

    gemm: float
    copy: float


@dataclass(kw_only=True)
class Bench:
    """Collects the rows of the table.

    Args:
        watch: takes the times.
        dtype: of all floating-point arguments.
        roofs: of which the kernels' rates are shares.
        peers: names of other packages' functions to time too; None for all that are installed.
        rows: the table so far.
        left_out: peers that could not be timed, and why.
    """

    watch: Stopwatch
    dtype: torch.dtype
    roofs: Roofs
    peers: Sequence[str] | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def case(self, op: Op, case: Case, length: int, backends: Sequence[str]) -> None:
        """One row a backend and pass, and the peers'; none where the case has no arguments for it."""
        if case.bench is None:
            return
        arguments = case.bench(Draw.seeded(length, device=self.watch.device, dtype=torch.float32), length)
        arguments = cast(arguments, self.dtype)
        found = {name: times for name in backends if (times := self._times(op, name, arguments, length))}
        work = self._work(op, arguments)
        for name, times in found.items():
            self._add(op.name, case.name, name, length, times, work, found.get("reference", {}))
        other = attention_arguments(arguments) if self._wanted(SDPA) else None
        if other is not None:
            b, h, t, dv = other["v"].shape
            times = passes(softmax_attention, other, self.watch)
            work = (2e-9 * b * h * t * t * dv, self.roofs.gemm, "GFLOP/s")
            self._add("attention", f"for {case.name}", SDPA, length, times, work, {})
        for peer in PEERS:
            if peer.op == op.name and self._wanted(peer.name) and served(peer, arguments, length):
                self._peer(peer, op, case, length)

    def _wanted(self, peer: str) -> bool:
        return self.peers is None or peer in self.peers

    def _peer(self, peer: Peer, op: Op, case: Case, length: int) -> None:
        if not peer.installed:
            self.left_out[peer.name] = f"the package {peer.package} is not installed (pip install 'omnimix[bench]')"
            return
        kind = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.watch.device)}
        found = times(peer, case.name, length, **kind, repeats=self.watch.repeats)
        if "error" in found:
            self.left_out[f"{peer.name} on {op.name}, {case.name}"] = found["error"]
        else:
            self._add(op.name, case.name, peer.name, length, found, None, {})

    def _times(self, op: Op, backend: str, arguments: dict[str, Any], length: int) -> dict[str, float] | None:
        longest = REFERENCE_STEPS if backend == "reference" else dict.fromkeys(PASSES, length)
        if length > longest["forward"] or (backend == "triton" and interpreting()):
            return None
        backward = length <= longest["forward+backward"]
        try:
            return passes(call_of(op, backend), arguments, self.watch, backward=backward)
        except BackendUnavailable:
            return None

    def _work(self, op: Op, arguments: dict[str, Any]) -> tuple[float, float, str] | None:
        """What a forward pass computes (GFLOP) or moves (GB), how much of it a second allows at most, and the unit."""
        if op.flops is not None:
            return op.flops(arguments) / 1e9, self.roofs.gemm, "GFLOP/s"
        if op.traffic is not None:
            return op.traffic(arguments) / 1e9, self.roofs.copy, "GB/s"
        return None

    def _add(
        self,
        op: str,
        case: str,
        backend: str,
        length: int,
        found: dict[str, float],
        work: tuple[float, float, str] | None,
        reference: dict[str, float],
    ) -> None:
        for name in (n for n in PASSES if n in found):
            taken = found[name]
            # Only the time of a backward pass is known: how much is computed again is the backend's affair.
            amount, roof, unit = work if work and name == "forward" else (None, None, None)
            rate = None if amount is None else amount / taken * 1e3
            self.rows.append(
                {
                    "op": op,
                    "case": case,
                    "backend": backend,
                    "pass": name,
                    "T": length,
                    "ms": round(taken, 3),
                    "rate": None if rate is None else round(rate, 1),
                    "unit": unit,
                    "of roof": None if rate is None or roof is None else round(rate / roof, 3),
                    "x reference": round(reference[name] / taken, 1) if name in reference else None,
                    "peak MB": round(found["MB"], 1) if name != "forward" and found["MB"] is not None else None,
                }
            )


def bench_all(
    *,
    ops_named: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 2048, 8192),
    backends: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 7,
) -> Bench:
    """Times every op that has cases for it, each backend that serves them, at each length.

    Args:
        ops_named: the ops; all by default.
        lengths: steps in time.
        backends: names of backends; all by default.
        peers: names of what to time too ("sdpa": softmax attention with the same heads; "fla chunk", ...); all
            that are installed by default.
        dtype: of the arguments.
        device: "cpu", "cuda", ...
        repeats: calls whose median is taken.

    Returns:
        The collected rows, the roofs (measured first), and the peers that were left out.

    Raises:
        UnknownName: no such op, backend, peer or dtype.
        ConfigError: a length or number of repeats below 1.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if min([repeats, *lengths]) < 1:
        raise ConfigError(f"repeats {repeats} and lengths {list(lengths)} must be at least 1")
    chosen = ops() if ops_named is None else tuple(get_op(name) for name in ops_named)
    _known("backend", backends, {b.name for op in chosen for b in op.backends})
    _known("peer", peers, {SDPA, *(peer.name for peer in PEERS)})
    pairs = [(op, case, t) for op in chosen for case in op.cases() if case.bench is not None for t in lengths]
    watch = Stopwatch(device=torch.device(device), repeats=repeats)
    roofs = Roofs(gemm=gemm_rate(watch, DTYPES[dtype]), copy=copy_rate(watch))
    bench = Bench(watch=watch, dtype=DTYPES[dtype], roofs=roofs, peers=peers)
    from rich.console import Console
    from rich.progress import track

    for op, case, length in track(pairs, description="bench", console=Console(stderr=True), transient=True):
        bench.case(op, case, length, [b.name for b in op.backends if backends is None or b.name in backends])
    return bench


def _known(kind: str, names: Sequence[str] | None, known: set[str]) -> None:
    for name in names or ():
        if name not in known:
            raise UnknownName(kind, name, known)


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Time over length, one panel an op's case with its peer, one line a backend and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r["op"], r["case"]) for r in rows if r["backend"] != SDPA))
    columns = min(3, len(panels))
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / columns), columns, squeeze=False, figsize=(5 * columns, 4), layout="constrained"
    )
    for axis, (op, case) in zip(axes.flat, panels, strict=False):
        shown = [r for r in rows if (r["op"], r["case"]) in {(op, case), ("attention", f"for {case}")}]
        for backend, direction in dict.fromkeys((r["backend"], r["pass"]) for r in shown):
            line = [(r["T"], r["ms"]) for r in shown if (r["backend"], r["pass"]) == (backend, direction)]
            style = "-" if direction == "forward" else "--"
            axis.plot(*zip(*sorted(line), strict=True), style, marker="o", label=f"{backend}, {direction}")
        axis.set(title=f"{op}: {case}", xlabel="steps", ylabel="ms", xscale="log", yscale="log")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench kernels`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="omnimix bench kernels", description=summary(__doc__))
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192], metavar="T", help="steps in time")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"only these packages ({SDPA}, fla ...); or none")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of the arguments")
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--repeats", type=int, default=7, help="calls whose median is taken")
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draw time over length")
    options = parser.parse_args(argv)
    from ..utils.console import emit

    set_threads(options.threads)
    device = usable_device(options.device)
    bench = bench_all(
        ops_named=options.ops,
        lengths=options.lengths,
        backends=options.backends,
        peers=options.peers,
        dtype=options.dtype,
        device=options.device,
        repeats=options.repeats,
    )
    where = where_on(device)
    roofs = f"a large matrix product runs at {bench.roofs.gemm:.0f} GFLOP/s, a copy at {bench.roofs.copy:.0f} GB/s"
    emit(f"kernels in {options.dtype} on {where}; {roofs}", bench.rows, options.json)
    for name, why in bench.left_out.items():
        say(f"left out: {name}: {why}", error=True)
    if options.plot and bench.rows:
        plot(bench.rows, options.plot)
    return 0
