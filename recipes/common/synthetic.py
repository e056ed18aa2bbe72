"""Data that is made on this machine, once, and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...utils.cache import cache_folder
from ...utils.files import one_at_a_time

# Files of a split at most: a number in a run's configuration must not fill a disk.
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
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        # mkdtemp's folder is private; one inside has the rights that any new folder has.
        (beside / "whole").mkdir()
        write(beside / "whole")
        try:
            os.rename(beside / "whole", folder)
        except OSError:
            # Another process was faster, and wrote the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
