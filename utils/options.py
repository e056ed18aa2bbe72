"""Options that several commands have, each defined once."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from .console import say
from .renamed import warn_renamed


def summary(doc: str | None) -> str:
    """The first line of a module's docstring, which Python may have left out."""
    return (doc or "").partition("\n")[0]


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`; see `console.emit`."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=output_file,
        help="write the rows as JSON too ('-': to standard output, alone)",
    )


def output_file(name: str) -> str:
    """The name of a file that a command is to write at its end, once it is sure that it can; "-" is no file.

    Raises:
        OutputError: it is a folder, or nothing can be written next to it.
    """
    if name == "-":
        return name
    path = Path(name)
    if path.is_dir():
        raise OutputError(f"{name!r}, where the result is to go, is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{name!r} cannot be written: {error.strerror}; name another file") from error
    return name


def add_device(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """`--device NAME`; see `devices.usable_device`."""
    parser.add_argument("--device", default=default, help=f"cpu, cuda, ... (default: {default})")


def add_threads(parser: argparse.ArgumentParser, kind: Any = int) -> None:
    """`--threads N`; see `set_threads`.

    Args:
        kind: what the parser takes; a configuration may hold null.
    """
    parser.add_argument(
        "--threads", type=kind, default=None, help="processor threads of each process; default: all cores"
    )


def renamed_option(parser: argparse.ArgumentParser, old: str, new: str, kind: Any) -> None:
    """Take an option by its old name too, with a FutureWarning."""

    class Renamed(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            warn_renamed(old, new)
            setattr(namespace, self.dest, values)

    parser.add_argument(
        old, dest=new.lstrip("-"), action=Renamed, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def underscored(argv: list[str]) -> list[str]:
    """A command line whose long options are written with underscores, as commands define them.

    Hyphens serve as well: `--max-new-tokens 5`. Values stay, and so does all that follows `--`.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    return [_underscored(word) for word in argv[:end]] + argv[end:]


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = "--" + name[2:].replace("-", "_")
    # argparse itself writes the opposite of a switch as `--no-NAME`.
    return name.replace("--no_", "--no-") + equals + value


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    """Let torch use so many processor threads, at most one a core; None leaves them as they are.

    Raises:
        ConfigError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    import torch

    if threads > cores():
        say(f"threads is {threads}; this machine has {cores()} cores: {cores()} threads are used", error=True)
    torch.set_num_threads(min(threads, cores()))
