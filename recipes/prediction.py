"""What the commands that name the classes of files share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..modalities.sources import walk_files


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


def ranked(path: Path, logits: Float[Tensor, "classes"], classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """One row a class, the likeliest first; `top` of them, or all where there are fewer.

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
