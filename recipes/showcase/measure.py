"""What `vision_folder` reaches with its defaults on the images of this package, and timm's models next to it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ...errors import OmnimixError
from ...utils.console import say
from . import peers
from .images import DATA

MIXERS = ("gla", "mamba", "attention")


def images(runs: Path, *, names: tuple[str, ...] = tuple(DATA), compare: bool = True) -> list[dict[str, Any]]:
    """One row a model and data set, with the accuracy on the test split, which no default was chosen by.

    All of it runs on one thread, and seconds are those of the processor.

    Args:
        runs: where the runs go.
        names: of the data sets.
        compare: whether timm's models are trained too, for as many epochs in batches of the same size: a DeiT of as
            many parameters and a small ResNet, each with three learning rates.

    Raises:
        PackageError: the data cannot be had.
        OmnimixError: a run failed.
    """
    rows = []
    for name in names:
        root = DATA[name]()
        for mixer in MIXERS if name == "emoji" else MIXERS[:1]:
            rows.append(_ours(root, name, mixer, runs))
            say(json.dumps(rows[-1]))
        if compare:
            rows += _theirs(root, name, runs)
    return rows


def _ours(root: Path, name: str, mixer: str, runs: Path) -> dict[str, Any]:
    run = f"{name}-{mixer}"
    options = ["--config", "vision_folder", "--data.root", str(root), "--model.mixer", mixer, "--threads", "1"]
    before = _seconds_of_children()
    _omnimix("vision", "fit", *options, "--name", run, "--runs", str(runs), "--overwrite")
    seconds = _seconds_of_children() - before
    result = runs / f"{run}.json"
    _omnimix("vision", "test", "--run", str(runs / run), "--threads", "1", "--json", str(result))
    metrics = json.loads((runs / run / "metrics.json").read_text(encoding="utf-8"))
    [tested] = json.loads(result.read_text(encoding="utf-8"))
    return _row(name, f"omnimix, {mixer}", metrics, metrics["val/acc1"], tested["test/acc1"], seconds, "default")


def _theirs(root: Path, name: str, runs: Path) -> list[dict[str, Any]]:
    folder = runs / f"{name}-{MIXERS[0]}"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    image, dim = _found(model, "image"), _found(model, "backbone")["dim"]
    size, patch = image["size"][0], image["patch"][0]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    batch, epochs = _found(config, "loading")["batch_size"], metrics["epochs"]
    # A layer of a transformer has twelve times the square of its width.
    depth = max(1, round(metrics["parameters"] / (12 * dim * dim)))
    rows = []
    for arguments in (peers.deit(size, patch, dim, depth), {"model_name": "resnet10t"}):
        found = peers.best(root, arguments, size=size, epochs=epochs, batch=batch)
        for i, peer in enumerate(found):
            label = f"timm, {peer.name}" + ("" if i == 0 else f", place {i + 1} of {len(found)} rates")
            about = {"parameters": peer.parameters, "epochs": epochs}
            rows.append(_row(name, label, about, peer.val, peer.test, peer.seconds, f"{peer.rate:g}"))
            say(json.dumps(rows[-1]))
    return rows


def _row(
    data: str, model: str, about: dict[str, Any], val: float, test: float, seconds: float, rate: str
) -> dict[str, Any]:
    return {
        "data": data,
        "model": model,
        "parameters": f"{about['parameters']:,}",
        "epochs": about["epochs"],
        "lr": rate,
        "validation": f"{val:.1%}",
        "test": f"{test:.1%}",
        "processor seconds": round(seconds),
    }


def _found(content: Any, key: str) -> Any:
    """The first mapping of this name anywhere in plain values."""
    if isinstance(content, dict):
        if isinstance(content.get(key), dict):
            return content[key]
        return next((inner for value in content.values() if (inner := _found(value, key)) is not None), None)
    return None


def _omnimix(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "omnimix", *words], env=environment, check=False)
    if done.returncode:
        raise OmnimixError(f"`omnimix {' '.join(words)}` failed")


def _seconds_of_children() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a page of the documentation."""
    keys = list(rows[0])
    table = [keys, ["---"] * len(keys), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(
        [
            "# Results on real data",
            "",
            "Made by `make showcase`: class folders, `omnimix vision fit --config vision_folder` with its defaults, on "
            "one thread. The test split was used for nothing else. timm's models were trained for as many steps, with "
            "its own optimiser, schedule and augmentation; of three rates the best by validation stands first.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
        ]
    )
