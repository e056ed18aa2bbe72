"""What the commands that classify files share."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...modalities.data.sources import walk_files
from ...utils.console import emit, write_atomically
from ...utils.devices import devices, usable_device
from ...utils.options import add_device, add_json, output_file

# What lasts so many times as long as a model's clips gets a timeline.
LONG = 3.0
CPU = torch.device("cpu")


def add_options(parser: argparse.ArgumentParser, each: str, batch_size: int) -> None:
    """The options of a command that classifies files.

    Args:
        each: what a file is called.
        batch_size: how many run together by default.
    """
    parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
    parser.add_argument("--top", type=int, default=1, help=f"classes to name for each {each} (%(default)s)")
    parser.add_argument("--policy", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    parser.add_argument(
        "--batch_size", type=int, default=batch_size, help=f"how many {each}s run together, at most (%(default)s)"
    )
    add_device(parser, default=devices()[0])
    add_json(parser)
    parser.add_argument(
        "--csv",
        metavar="FILE",
        type=output_file,
        help="write the rows as CSV too ('-': to standard output, alone)",
    )


def add_timeline(parser: argparse.ArgumentParser) -> None:
    """The options of a command that labels long files over time."""
    parser.add_argument(
        "--timeline",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"label each file over time; by default files {LONG:g} times as long as the model's clips",
    )
    parser.add_argument("--every", type=int, default=4, help="moments of a timeline to the length of a clip")


def check_counts(**counts: int) -> None:
    """Raise ConfigError where a number, of classes for example, is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")


def check_options(options: Any) -> torch.device:
    """Look at the options of `add_options` before anything long begins.

    Returns:
        The device.

    Raises:
        ConfigError: a number below 1, or a device that does not exist.
    """
    check_counts(top=options.top, batch_size=options.batch_size)
    if options.json == options.csv == "-":
        raise ConfigError("--json and --csv are both '-'; only one of them can be the standard output")
    return usable_device(options.device)


def silent(options: Any) -> bool:
    """Whether standard output belongs to the rows alone."""
    return "-" in (options.json, options.csv)


def write_rows(rows: list[dict[str, Any]], options: Any) -> int:
    """Write what was found as JSON and CSV, where it is asked for.

    Returns:
        The exit code: 1 where nothing was readable.
    """
    if options.json == "-":
        emit("", rows, "-")
    elif options.json is not None:
        write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
    if options.csv is not None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(table, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if options.csv == "-":
            sys.stdout.write(table.getvalue())
        else:
            write_atomically(options.csv, table.getvalue())
    return 0 if any(row["class"] is not None for row in rows) else 1


def named_files(words: Sequence[str], suffixes: Collection[str], noun: str) -> list[Path]:
    """The files, and those below the folders, that a user named.

    Args:
        suffixes: of the files in folders that count.
        noun: what they are, in the plural.

    Raises:
        ConfigError: there is no such file or folder, or a folder without such files.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if not path.exists():
            raise ConfigError(f"there is no file or folder {word!r}")
        found = walk_files(path, suffixes) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"the folder {word!r} holds no {noun}")
        files += found
    return files


def ranked(path: Path, logits: Float[Tensor, " classes"], classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """One row a class, the most probable first; `top` of them, or all where there are fewer.

    Raises:
        ConfigError: `top` is below 1.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1")
    values, indices = logits.float().cpu().softmax(-1).topk(min(top, len(classes)))
    return [
        {"file": str(path), "rank": rank, "class": classes[index], "probability": value, "note": ""}
        for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), 1)
    ]


def unreadable(path: Path, error: Exception) -> dict[str, Any]:
    """The row of a file that cannot be read, and why."""
    return {"file": str(path), "rank": None, "class": None, "probability": None, "note": str(error)}
