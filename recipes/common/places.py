"""`--data PATH`: a folder or file of one's own in place of the name of a data set."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ConfigError
from .. import CONFIGS
from .arguments import CONFIG_OPTIONS, data_class, data_paths
from .options import RecipeData


def with_data_set(argv: list[str], data: type[RecipeData], *, fresh: bool = True) -> list[str]:
    """A command line in which the name of a data set and its option stand for `--data PATH`.

    `--data.root PATH` and `--data.path PATH` mean the same where nothing else says which data set it is.

    Args:
        data: the base class of the recipe's data sets, whose `reader_of` says which one reads a path.
        fresh: whether no run says which data set it is.

    Raises:
        ConfigError: there is no such folder or file, or no data set reads it.
    """
    found: list[str] = []
    base: str | None = None
    open_ = fresh and not data_paths(argv) and not _packaged(argv)
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--data" and not (open_ and option in ("--data.root", "--data.path")):
            found.append(word)
            continue
        value = value if equals else next(words, "")
        if option == "--data" and not _is_path(value, data):
            found += [option, value]
            continue
        path = Path(value).expanduser()
        if not path.exists():
            whole = "" if path.is_absolute() else f"; from the present folder it would be {os.path.abspath(path)!r}"
            raise ConfigError(f"data is {value!r}; there is no such folder or file{whole}")
        reader = data.reader_of(path)
        base = reader.configuration
        found += ["--data", reader.data_set, *(f"--data.{name}={value}" for name, value in reader.options.items())]
    configured = any(word.partition("=")[0] in CONFIG_OPTIONS for word in found)
    return found if base is None or configured else ["--config", base, *found]


def _packaged(argv: list[str]) -> bool:
    """Whether a command line names a packaged configuration."""
    words = [word.partition("=")[2] or word for word in argv]
    return any((CONFIGS / f"{word}.yaml").is_file() for word in words if word and os.sep not in word)


def _is_path(value: str, data: type[RecipeData]) -> bool:
    """Whether what is typed after `--data` is a place, and not the name of a data set or a mapping of its options."""
    if not value or value.lstrip().startswith("{") or data_class(data, value) is not None:
        return False
    return Path(value).expanduser().exists() or any(mark in value for mark in {"/", os.sep}) or value[0] in "~."
