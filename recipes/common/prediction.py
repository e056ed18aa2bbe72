"""What the commands that classify files share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...modalities.data.sources import walk_files
from ...utils.console import emit, write_atomically
from ...utils.options import add_json

# What lasts so many times as long as a model's clips gets a timeline.
LONG = 3.0


def add_options(parser: argparse.ArgumentParser, each: str) -> None:
    """The options of a command that classifies short files, and labels long ones over time.

    Args:
        each: what a short file is called.
    """
    parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
    parser.add_argument("--top", type=int, default=1, help=f"classes to name for each {each}; a timeline names one")
    parser.add_argument(
        "--timeline",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"label each file over time; by default files {LONG:g} times as long as the model's clips",
    )
    parser.add_argument("--every", type=int, default=4, help="moments of a timeline to the length of a clip")
    parser.add_argument("--policy", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    add_json(parser)


def check_counts(top: int, every: int) -> None:
    """Raise ConfigError where a number of classes, or of moments, is below 1."""
    for name, count in (("top", top), ("every", every)):
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")


def make_folder(option: str, file: str | None) -> None:
    """Make the folder of a file that an option names: what is written at the end must not fail for the lack of it.

    Args:
        file: None and "-" are no files.

    Raises:
        ConfigError: it is a folder itself, or its folder cannot be made.
    """
    if file in (None, "-"):
        return
    if Path(file).is_dir():
        raise ConfigError(f"{option} is {file!r}, which is a folder; name a file in it")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} is {file!r}, whose folder cannot be made: {error.strerror}") from error


def write_rows(rows: list[dict[str, Any]], file: str | None) -> int:
    """Write what was found as JSON, where it is asked for.

    Args:
        file: of `--json`: None is no file, and "-" standard output.

    Returns:
        The exit code: 1 where nothing was readable.
    """
    if file == "-":
        emit("", rows, "-")
    elif file is not None:
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
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
    values, indices = logits.float().softmax(-1).topk(min(top, len(classes)))
    return [
        {"file": str(path), "rank": rank, "class": classes[index], "probability": value, "note": ""}
        for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), 1)
    ]


def unreadable(path: Path, error: Exception) -> dict[str, Any]:
    """The row of a file that cannot be read, and why."""
    return {"file": str(path), "rank": None, "class": None, "probability": None, "note": str(error)}
