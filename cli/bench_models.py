"""Times whole models of a modality over input sizes, compared with plain transformers: `omnimix bench models`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UnknownName
from ..utils.devices import usable_device, where_on
from ..utils.files import replace_file
from ..utils.options import add_device, add_json, add_threads, set_threads, summary
from .bench_kernels import DTYPES, Stopwatch, gemm_rate
from .bench_models_peers import MODALITIES, modality


def passes(model: nn.Module, sample: torch.Tensor, watch: Stopwatch) -> dict[str, float]:
    """Milliseconds of inference, and of a training step without the optimizer's part."""
    model.eval()
    with torch.no_grad():
        forward = watch.milliseconds(lambda: model(sample))
    model.train()

    def step() -> None:
        model.zero_grad()
        model(sample).float().square().mean().backward()

    return {"forward": forward, "forward+backward": watch.milliseconds(step)}


def bench_models(
    *,
    kind: str = "image",
    models: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """One row a model, size and pass; the last model named is the one that the others are compared with.

    Args:
        kind: "image", "video" or "audio".
        models: names, of ours, "timm:NAME" or "transformers:NAME"; by default the modality's.
        sizes: sides of square images in pixels, frames of clips, or seconds of sounds; by default the modality's.
        batch: samples a call.
        dtype: of weights and samples.
        device: "cpu", "cuda", ...
        repeats: calls whose median is taken, after one that is not timed.

    Raises:
        UnknownName: no such modality, model or dtype.
        MissingPackage: a peer's package is not installed.
        ConfigError: a size, batch or number of repeats below 1.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    chosen = modality(kind)
    models, sizes = models or chosen.models, chosen.sizes if sizes is None else sizes
    if min([batch, repeats, *sizes]) < 1:
        raise ConfigError(f"batch {batch}, repeats {repeats} and sizes {list(sizes)} must be at least 1")
    watch = Stopwatch(device=torch.device(device), repeats=repeats)
    from rich.console import Console
    from rich.progress import track

    taken: dict[tuple[str, int], dict[str, float]] = {}
    pairs = [(name, size) for size in sizes for name in models]
    for name, size in track(pairs, description="bench", console=Console(stderr=True), transient=True):
        model = chosen.build(name, size).to(device=device, dtype=DTYPES[dtype])
        sample = chosen.sample(size, batch).to(device=device, dtype=DTYPES[dtype])
        taken[name, size] = passes(model, sample, watch)
    return [
        {
            "model": name,
            "size": size,
            "pass": kind,
            "ms": round(taken[name, size][kind], 1),
            f"{chosen.noun}/s": round(batch / taken[name, size][kind] * 1e3, 2),
            f"x {models[-1]}": round(taken[models[-1], size][kind] / taken[name, size][kind], 2),
        }
        for size in sizes
        for kind in ("forward", "forward+backward")
        for name in models
    ]


def plot(rows: Sequence[dict[str, Any]], path: str, unit: str) -> None:
    """Time over size, one line a model, one panel a pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["pass"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), squeeze=False, figsize=(5 * len(kinds), 4), layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            line = sorted((row["size"], row["ms"]) for row in rows if (row["model"], row["pass"]) == (name, kind))
            axis.plot(*zip(*line, strict=True), marker="o", label=name)
        axis.set(title=kind, xlabel=unit, ylabel="ms", xscale="log", yscale="log")
        ticks = sorted({row["size"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench models`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="omnimix bench models", description=summary(__doc__))
    parser.add_argument("--kind", default="image", choices=list(MODALITIES), help="the modality")
    peers = "ours, timm:NAME, transformers:videomae_tiny or transformers:ast_tiny; the last one is the peer"
    parser.add_argument("--models", nargs="+", metavar="NAME", help=peers)
    units = ", ".join(f"{entry.unit} ({name})" for name, entry in MODALITIES.items())
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help=units)
    parser.add_argument("--batch", type=int, default=1, help="samples a call")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of weights and samples")
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--repeats", type=int, default=5, help="calls whose median is taken")
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draw time over size")
    options = parser.parse_args(argv)
    from ..utils.console import emit

    set_threads(options.threads)
    device = usable_device(options.device)
    names = ("kind", "models", "sizes", "batch", "dtype", "device", "repeats")
    rows = bench_models(**{name: getattr(options, name) for name in names})
    watch = Stopwatch(device=torch.device(options.device), repeats=options.repeats)
    rate = gemm_rate(watch, DTYPES[options.dtype])
    where = where_on(device)
    title = f"{options.kind} models in {options.dtype}, batch {options.batch}, on {where}"
    emit(f"{title}; a large matrix product runs at {rate:.0f} GFLOP/s", rows, options.json)
    if options.plot:
        plot(rows, options.plot, modality(options.kind).unit)
    return 0
