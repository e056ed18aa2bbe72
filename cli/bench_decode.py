"""Times decoding against the length of the context, compared with transformers: `omnimix bench decode`.

Each model is measured in a process of its own: some packages change how others behave once they are imported.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownName
from ..utils.console import say
from ..utils.devices import usable_device, where_on
from ..utils.files import replace_file
from ..utils.options import add_device, add_json, add_threads, set_threads, summary
from .bench_blocks import HIDDEN
from .bench_decode_models import DEFAULT, MODELS, OURS, PEERS, THEIRS, Decoder, Sizes, build
from .bench_kernels import DTYPES, Stopwatch, peak_bytes
from .bench_kernels_peers import in_its_own_process

WARM = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is measured.

    Args:
        lengths: tokens read before the steps that are timed.
        steps: how many are timed at each length.
        prompt: tokens of the prompt whose reading is timed.
        chunk: tokens that are read at a time on the way to the lengths.
        patience: seconds that this way may take; lengths that are farther are left out.
    """

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    steps: int = 32
    prompt: int = 4096
    chunk: int = 2048
    patience: float = 300.0

    def __post_init__(self) -> None:
        if min([*self.lengths, self.steps, self.prompt, self.chunk]) < 1:
            raise ConfigError(
                f"lengths {list(self.lengths)}, steps {self.steps}, prompt {self.prompt} and chunk {self.chunk} must "
                "be at least 1"
            )


def approach(decoder: Decoder, draw: Any, plan: Plan) -> dict[int, Any]:
    """Memories after reading each of the lengths for real, as far as patience goes."""
    memory, place, spent, last = None, 0, 0.0, 0.0
    found: dict[int, Any] = {}
    for length in sorted(set(plan.lengths)):
        while place < length:
            # The time of a chunk does not fall with what was read before it.
            if spent + last * (length - place) / plan.chunk > plan.patience:
                return found
            size, start = min(plan.chunk, length - place), time.perf_counter()
            memory = decoder.read(draw(size), memory)
            last = time.perf_counter() - start
            spent, place = spent + last, place + size
        found[length] = memory
        memory = decoder.fork(memory)
    return found


def measure(decoder: Decoder, sizes: Sizes, plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens/s of reading the prompt and, by length, milliseconds a step, bytes of the memory and of a step's peak."""
    decoder.net.to(device=device, dtype=dtype).eval()

    def draw(count: int) -> Tensor:
        return torch.randint(sizes.vocab_size, (sizes.batch, count), device=device)

    watch = Stopwatch(device=device, repeats=3)
    with torch.inference_mode():
        decoder.read(draw(min(256, plan.prompt)), None)
        prompt = draw(plan.prompt)
        reading = watch.milliseconds(lambda: decoder.read(prompt, None))
        memories = approach(decoder, draw, plan)
        # In turns, so that what disturbs the machine meets every length.
        taken: dict[int, list[float]] = {length: [] for length in memories}
        for _ in range(WARM + plan.steps):
            for length in memories:
                token = draw(1)
                start = time.perf_counter()
                memories[length] = decoder.step(token, memories[length])
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                taken[length].append(time.perf_counter() - start)
        lengths = {}
        for length, memory in memories.items():
            token = draw(1)
            lengths[length] = {
                "ms": statistics.median(taken[length][WARM:]) * 1e3,
                "state": sum(x.nbytes for x in decoder.tensors(memory)),
                "peak": peak_bytes(lambda token=token, memory=memory: decoder.step(token, memory), device),
            }
    parameters = sum(p.numel() for p in decoder.net.parameters())
    return {"reading": sizes.batch * plan.prompt / reading * 1e3, "parameters": parameters, "lengths": lengths}


def bench_decode(
    *,
    models: Sequence[str] = DEFAULT,
    sizes: Sizes | None = None,
    plan: Plan | None = None,
    peers: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a model, ours and transformers', and length.

    Args:
        models: names out of MODELS.
        sizes: of the models.
        plan: what is timed.
        peers: whether transformers' models of the same architecture are timed too.
        dtype: of the weights.
        device: "cpu", "cuda", ...

    Returns:
        The rows, and what was left out with the reason.

    Raises:
        UnknownName: no such model or dtype.
        ConfigError: a length, size or number below 1.
    """
    for name in models:
        if name not in MODELS:
            raise UnknownName("model of bench decode", name, MODELS)
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    sizes, plan = sizes or Sizes(), plan or Plan()
    chosen = [(name, side) for name in models for side in (OURS, THEIRS) if side == OURS or (peers and name in PEERS)]
    from rich.console import Console
    from rich.progress import track

    found: dict[tuple[str, str], dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, side in track(chosen, description="bench", console=Console(stderr=True), transient=True):
        if side == THEIRS and importlib.util.find_spec(THEIRS) is None:
            left_out[f"{side}, {name}"] = f"not installed: {THEIRS} (pip install 'omnimix[bench]')"
            continue
        asked = {"model": name, "side": side, "dtype": dtype, "device": device}
        taken = in_its_own_process(__name__, asked | {"sizes": asdict(sizes), "plan": asdict(plan)})
        if "error" in taken:
            left_out[f"{side}, {name}"] = taken["error"]
            continue
        found[name, side] = taken
        for length in sorted(set(plan.lengths)):
            if str(length) not in taken["lengths"]:
                left_out[f"{side}, {name}, after {length} tokens"] = f"reading takes longer than {plan.patience:.0f} s"
    return [row for name, side in found for row in _rows(name, side, found, sizes.batch)], left_out


def _rows(name: str, side: str, found: dict[tuple[str, str], dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    own, peer = found[name, side], found.get((name, THEIRS))
    theirs = {} if peer is None else peer["lengths"]
    shortest = next((at["ms"] for at in own["lengths"].values()), 0.0)

    def megabytes(count: int | None) -> float | None:
        return None if count is None else round(count / 1e6, 3)

    def ratio(mine: float, other: float | None) -> float | None:
        return None if other is None else round(mine / other, 3)

    return [
        {
            "model": name,
            "with": side,
            "M parameters": round(own["parameters"] / 1e6, 1),
            "context": int(length),
            "ms/step": round(at["ms"], 3),
            "tokens/s": round(batch / at["ms"] * 1e3, 1),
            "x shortest": ratio(shortest, at["ms"]),
            f"x {THEIRS}": ratio(1 / at["ms"], 1 / theirs[length]["ms"] if length in theirs else None),
            "state MB": megabytes(at["state"]),
            "step's peak MB": megabytes(at["peak"]),
            "prompt tokens/s": round(own["reading"], 1),
            f"prompt x {THEIRS}": ratio(own["reading"], None if peer is None else peer["reading"]),
        }
        for length, at in own["lengths"].items()
    ]


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Tokens/s and the state's size over the context, one line a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, key in zip(figure.subplots(1, 2), ("tokens/s", "state MB"), strict=True):
        for name, side in dict.fromkeys((row["model"], row["with"]) for row in rows):
            line = sorted((row["context"], row[key]) for row in rows if (row["model"], row["with"]) == (name, side))
            style = {"ls": "--", "marker": "s", "alpha": 0.75} if side == THEIRS else {"ls": "-", "marker": "o"}
            label = f"{name}, {side}" if side == THEIRS else name
            axes.plot(*zip(*line, strict=True), color=f"C{names.index(name)}", label=label, lw=2, **style)
        title = "tokens decoded per second" if key == "tokens/s" else "memory of the state, MB"
        axes.set(xlabel="tokens read before", xscale="log", yscale="log")
        axes.set_title(title, loc="left", weight="bold")
        ticks = sorted({row["context"] for row in rows})
        axes.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(color="#d9dde5", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: figure.savefig(part, dpi=150, format="png"))


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench decode`."""
    from jsonargparse import ArgumentParser

    sizes, plan = Sizes(), Plan()
    parser = ArgumentParser(prog="omnimix bench decode", description=summary(__doc__))
    parser.add_argument(
        "--models", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"out of {', '.join(MODELS)}"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' models out")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(plan.lengths), metavar="T", help="tokens read before the steps"
    )
    parser.add_argument("--steps", type=int, default=plan.steps, help="steps whose median is taken, at each length")
    parser.add_argument("--prompt", type=int, default=plan.prompt, help="tokens of the prompt whose reading is timed")
    parser.add_argument("--chunk", type=int, default=plan.chunk, help="tokens read at a time on the way to a length")
    parser.add_argument(
        "--patience", type=float, default=plan.patience, help="seconds a model may read; longer lengths are left out"
    )
    for name, value in asdict(sizes).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{name} of the models (default {value})")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of the weights")
    add_device(parser)
    add_threads(parser)
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draw tokens/s and memory over the context")
    options = parser.parse_args(argv)
    from ..utils.console import emit

    set_threads(options.threads)
    device = usable_device(options.device)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(sizes)})
    names = ("steps", "prompt", "chunk", "patience")
    plan = Plan(lengths=tuple(options.lengths), **{name: getattr(options, name) for name in names})
    rows, left_out = bench_decode(
        models=options.models,
        sizes=sizes,
        plan=plan,
        peers=not options.no_peers,
        dtype=options.dtype,
        device=options.device,
    )
    where = where_on(device)
    shape = f"{sizes.depth} layers, {sizes.dim} wide, {sizes.vocab_size} tokens, batch {sizes.batch}"
    emit(f"decoding in {options.dtype} on {where}: {shape}; prompt of {plan.prompt} tokens", rows, options.json)
    for name, why in left_out.items():
        say(f"left out: {name}: {why}", error=True)
    if options.plot and rows:
        plot(rows, options.plot)
    return 0


def _alone(asked: dict[str, Any]) -> None:
    """One model, as `bench_decode` asks for it; prints what was measured as JSON."""
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    if asked["side"] == THEIRS:
        # None in sys.modules makes a package look as if it were not installed.
        sys.modules |= dict.fromkeys(HIDDEN)
    sizes = Sizes(**asked["sizes"])
    plan = Plan(**asked["plan"] | {"lengths": tuple(asked["plan"]["lengths"])})
    decoder = build(asked["model"], asked["side"], sizes)
    print(json.dumps(measure(decoder, sizes, plan, torch.device(asked["device"]), DTYPES[asked["dtype"]])))


if __name__ == "__main__":
    _alone(json.loads(sys.argv[1]))
