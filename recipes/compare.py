"""`omnimix compare`: runs next to each other, by their numbers, their curves and what each of them gets right."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, ConfigError
from ..utils.console import emit, say, write_atomically
from ..utils.options import add_json, output_file, summary
from ..utils.run_folder import RunFolder

Row = TypeVar("Row")
PREDICTIONS = "predictions.csv"
# Classes and samples that are printed; the JSON has all of them.
SHOWN = 30
# Column -> number in metrics.json.
_NUMBERS = {
    "top 1": "val/acc1",
    "top 5": "val/acc5",
    "loss": "val/loss",
    "bits per byte": "val/bits_per_byte",
    "perplexity": "val/perplexity",
    "parameters": "parameters",
    "epochs": "epochs",
    "train s": "train_seconds",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left.

    Args:
        name: of its folder, or the folder itself where two have one name.
        metrics: its numbers.
        history: rows of its logs, by column.
        predictions: of the held-out samples, (label, prediction) in their order; None where none are stored.
    """

    name: str
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    predictions: list[tuple[str, str]] | None


def write_predictions(folder: RunFolder, classes: Sequence[str], labels: Sequence[int], said: Sequence[int]) -> None:
    """Write what a run predicts of its held-out samples, in their order."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "label", "prediction"])
    table.writerows([i, classes[a], classes[b]] for i, (a, b) in enumerate(zip(labels, said, strict=True)))
    write_atomically(folder.path / PREDICTIONS, text.getvalue())


def read(runs: Sequence[str]) -> list[Outcome]:
    """What the runs, by folder or name, left.

    Raises:
        CheckpointError: one is not a run directory, or not finished.
        ConfigError: fewer than two, or one twice.
    """
    folders = [RunFolder.finished(run) for run in runs]
    if len({folder.path.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError(f"runs are {', '.join(map(repr, runs))}; compare needs two or more different ones")
    names = [folder.path.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.path) for folder in folders]
    return [_outcome(name, folder) for name, folder in zip(names, folders, strict=True)]


def _outcome(name: str, folder: RunFolder) -> Outcome:
    file = folder.path / PREDICTIONS
    predictions = None
    if file.is_file():
        predictions = _rows(file, lambda row: (row["label"], row["prediction"]))
    try:
        metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(folder.metrics)!r} has no numbers of a run: {error}") from error
    history: list[dict[str, float]] = []
    # A resumed run has one file for each part of it.
    parts = sorted(folder.path.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.partition("_")[2]))
    for part in parts:
        history += _rows(part, lambda row: {key: float(value) for key, value in row.items() if key and value})
    return Outcome(name=name, metrics=metrics, history=history, predictions=predictions)


def _rows(file: Path, take: Callable[[dict[str, str]], Row]) -> list[Row]:
    """What `take` makes of each row of a table.

    Raises:
        CheckpointError: the table is corrupt.
    """
    try:
        with file.open(encoding="utf-8", newline="") as rows:
            return [take(row) for row in csv.DictReader(rows)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{file} is corrupt ({type(error).__name__}: {error}); train the run again") from error


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value of McNemar's test.

    Args:
        only_first: samples that only the first gets right.
        only_second: samples that only the second gets right.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
        Psychometrika 12 (1947).
    """
    total = only_first + only_second
    tail = sum(comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def by_class(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The accuracy on each class, one column a run; where they differ most first."""
    rows = []
    for label in sorted({label for each in outcomes for label, _ in each.predictions or ()}):
        row: dict[str, Any] = {"class": label}
        for each in outcomes:
            right = [label == said for truth, said in each.predictions or () if truth == label]
            row[each.name] = sum(right) / len(right) if right else None
        rows.append(row)
    return sorted(rows, key=_spread, reverse=True)


def _spread(row: dict[str, Any]) -> float:
    values = [value for key, value in row.items() if key != "class" and value is not None]
    return max(values) - min(values)


def pairs(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each two runs: how many samples which of them gets right, the test, and the samples that tell them apart.

    Runs that were not validated on the same samples are no pair.
    """
    rows = []
    for a, b in combinations(outcomes, 2):
        if not same_samples(a, b):
            continue
        both = list(zip(a.predictions or (), b.predictions or (), strict=True))
        right = [(said == label, other == label) for (label, said), (_, other) in both]
        differing = [
            {"sample": i, "label": both[i][0][0], a.name: both[i][0][1], b.name: both[i][1][1]}
            for i, (first, second) in enumerate(right)
            if first != second
        ]
        row = {"first": a.name, "second": b.name, "both right": right.count((True, True))}
        row |= {"only first": right.count((True, False)), "only second": right.count((False, True))}
        row |= {"neither": right.count((False, False))}
        rows.append(row | {"p": mcnemar(row["only first"], row["only second"]), "samples": differing})
    return rows


def same_samples(a: Outcome, b: Outcome) -> bool:
    """Whether both have predictions, of samples with the same labels in the same order."""
    if a.predictions is None or b.predictions is None:
        return False
    return [label for label, _ in a.predictions] == [label for label, _ in b.predictions]


def picture(outcomes: Sequence[Outcome], path: str) -> None:
    """Draw the curves of the runs over each other."""
    from .common import report

    wanted = {"val/acc1": "top 1", "val/bits_per_byte": "bits per byte", "val/loss": "held-out loss"}
    wanted |= {"train/loss": "training loss"}
    panels = []
    for key, title in wanted.items():
        # One history in which each run's column has its own name, which is what a line is of.
        rows = [{"step": row["step"], each.name: row[key]} for each in outcomes for row in each.history if key in row]
        if rows:
            lines = {each.name: each.name for each in outcomes}
            panels.append(report.curves(rows, lines, title, percent=key == "val/acc1", over="step"))
    if len(outcomes) > len(report.LINES):
        raise ConfigError(
            f"{len(outcomes)} runs; the picture has colours for {len(report.LINES)}: name fewer, or --picture ''"
        )
    numbers = [
        f"{each.name}: "
        + ", ".join(
            f"{name} {each.metrics[key]:.4g}"
            for name, key in list(_NUMBERS.items())[:5]
            if isinstance(each.metrics.get(key), int | float)
        )
        for each in outcomes
    ]
    report.write_report(
        path, "runs compared", "  ·  ".join(numbers), [report.Row(panels=panels, height=4.6)] if panels else []
    )


def main(argv: list[str]) -> int:
    """`omnimix compare`."""
    parser = argparse.ArgumentParser(prog="omnimix compare", description=summary(__doc__))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its name under runs/")
    parser.add_argument(
        "--picture",
        type=lambda name: name and output_file(name),
        default="compare.png",
        help="of the curves; '' draws none",
    )
    add_json(parser)
    options = parser.parse_args(argv)
    outcomes = read(options.runs)
    rows = [
        {"run": each.name, "mixer": each.metrics.get("mixer")}
        | {name: each.metrics.get(key) for name, key in _NUMBERS.items() if any(key in o.metrics for o in outcomes)}
        for each in outcomes
    ]
    classes, tested = by_class(outcomes), pairs(outcomes)
    if options.picture:
        picture(outcomes, options.picture)
    if options.json is not None:
        text = json.dumps({"runs": rows, "classes": classes, "pairs": tested}, indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return 0
        write_atomically(options.json, text)
    _print(outcomes, rows, classes, tested)
    if options.picture:
        say(f"picture: {options.picture}")
    return 0


def _print(outcomes: Sequence[Outcome], rows: list[Any], classes: list[Any], tested: list[dict[str, Any]]) -> None:
    emit("runs", rows)
    if classes:
        emit(
            f"accuracy by class, where the runs differ most ({min(SHOWN, len(classes))} of {len(classes)})",
            classes[:SHOWN],
        )
    if tested:
        table = [{key: value for key, value in row.items() if key != "samples"} for row in tested]
        emit("held-out samples that are right; p: McNemar's exact test", table)
    for row in tested:
        if row["samples"]:
            title = f"right with one of {row['first']} and {row['second']} ({len(row['samples'])} samples)"
            emit(title, row["samples"][:10])
    for a, b in combinations(outcomes, 2):
        if a.predictions is not None and b.predictions is not None and not same_samples(a, b):
            say(f"{a.name} and {b.name} were not validated on the same samples: they are not tested against each other")
