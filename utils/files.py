"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# The suffix of a file or a folder until it is whole.
PART = ".part"


def replace_file(target: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write next to `target`, flush to the disk, and put it in the place of `target` in one step.

    Args:
        target: its folder is made where there is none; an interrupt or a full disk leaves an old file whole.
        write: is given the path that it is to write to.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _named(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART)
        os.close(handle)
        temporary = Path(name)
        try:
            _write(temporary, target, write)
        finally:
            temporary.unlink(missing_ok=True)


def _write(temporary: Path, target: Path, write: Callable[[Path], Any]) -> None:
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    # mkstemp's files are private; these have the rights that any new file has.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(target)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Let errors of the system name the file that was to be written, and not the temporary one, or none."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename
        if error.errno is not None and (name is None or str(name).endswith(PART)):
            error.filename, error.filename2 = str(target), None
        raise


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """A new folder, in a hidden one next to `target`, for what is to take the place of `target` when it is whole.

    The hidden one is locked while its process lives, and goes with it. One that a killed process has left is removed
    by the next that makes `target`; what had given way to it, `replaced` in the hidden folder, comes back first.

    Args:
        target: its folder must exist.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):
        with contextlib.suppress(OSError):
            with _lock(left / "lock", wait=False):
                if (left / "replaced").exists() and not os.path.lexists(target):
                    (left / "replaced").rename(target)
                for inside in left.iterdir():
                    if inside.name != "lock":
                        shutil.rmtree(inside)
            # Windows removes no file that is open.
            shutil.rmtree(left)
    hidden = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART))
    try:
        with _lock(hidden / "lock", wait=False):
            # mkdtemp's folder is private; one inside has the rights that any new folder has.
            (hidden / "whole").mkdir()
            yield hidden / "whole"
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _lock(file: Path, *, wait: bool) -> contextlib.AbstractContextManager[Any]:
    """A lock on a file, which ends with its process; TimeoutError, an OSError, where another holds it and `wait` is
    False."""
    # It imports asyncio, which few commands need.
    import filelock

    return filelock.FileLock(file, timeout=-1 if wait else 0)


def replace_tensors(target: str | os.PathLike[str], tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        tensors: contiguous ones on the CPU, by name.
        about: what the file says of itself.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        replace_file(target, lambda path: save_file(dict(tensors), path, metadata=dict(about)))
    except SafetensorError as error:
        # It holds the system's error in words.
        found = re.search(r"\bos error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error


@contextlib.contextmanager
def one_at_a_time(target: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process at a time make `target`; the others wait, and then find it.

    The lock is on a file next to it and ends with its process, however that ends.

    Args:
        target: its folder is made where there is none.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f".{target.name}.lock", wait=True):
        yield
