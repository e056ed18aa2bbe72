"""Data that is made on this machine, once, and kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...utils.cache import cache_folder
from ...utils.files import hidden_folder, one_at_a_time

# The most files of a class or split: a number in a run's configuration must not fill a disk.
MOST = 100_000


def generated_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made now where it is not there yet: whole or not at all.

    Args:
        name: of the folder; it has to name everything that what lies in it depends on.
        write: fills the empty folder that it is given.
    """
    folder = cache_folder(name)
    if folder.is_dir():
        return folder
    with one_at_a_time(folder):
        return folder if folder.is_dir() else _made(folder, write)


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    with hidden_folder(folder) as whole:
        write(whole)
        try:
            whole.rename(folder)
        except OSError:
            # Another process was faster, and wrote the same.
            if not folder.is_dir():
                raise
    return folder
