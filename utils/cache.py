"""What is made on this machine once and kept: one folder a user."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` of the user's cache; it need not exist yet.

    It lies below `XDG_CACHE_HOME` where that is set, otherwise where the system keeps caches. A user without a home
    has one below the folder for temporary files.
    """
    # platformdirs heeds the variable on Linux alone.
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "omnimix" / name
    import platformdirs

    # Without a home platformdirs raises, and older ones return the path with its `~`.
    try:
        folder = Path(platformdirs.user_cache_dir("omnimix", appauthor=False))
    except RuntimeError:
        return _without_home() / name
    return (folder if folder.is_absolute() else _without_home()) / name


def name_caches_without_home() -> None:
    """Name the caches of matplotlib and torch where the user has no home: older ones cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder("matplotlib")))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))


@functools.lru_cache(maxsize=1)
def _without_home() -> Path:
    """A folder of this user alone, since libraries are loaded from it: another's of that name is not taken."""
    folder = Path(tempfile.gettempdir()) / f"omnimix-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="omnimix-"))
