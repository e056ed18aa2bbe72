"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def replace_file(target: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write beside `target`, flush to the disk, and put it in the place of `target` in one step.

    Args:
        target: its folder is made where there is none; an interrupt or a full disk leaves an old file whole.
        write: is given the path that it is to write to.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp's files are private; these have the rights that any new file has.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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

    The lock is on a file beside it and ends with its process, however that ends. Where the system has no such locks
    (Windows) all go on at once, so what they write must appear whole or not at all even so.

    Args:
        target: its folder is made where there is none.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
