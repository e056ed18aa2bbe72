"""Options that several commands have, each defined once."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..errors import ConfigError
from .console import say


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`; see `console.emit`."""
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too ('-': to standard output, alone)")


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
