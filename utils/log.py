"""What the library says of its work: records of `logging` under "omnimix", which the commands alone print."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from .console import markup, say, visible

# Seconds from line to line of what takes long, where no bar can move.
EVERY = 10.0
_ROOT = logging.getLogger("omnimix")
# Without a handler Python would print the warnings of a library whose program has set up no log.
_ROOT.addHandler(logging.NullHandler())


def logger_of(module: str) -> logging.Logger:
    """The logger of a module of the package, which prints nothing unless a program asks for it."""
    return logging.getLogger(module)


class _Console(logging.Handler):
    """Prints each record as one line on what is the standard error at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), error=True)


_console = _Console()
_lock = threading.Lock()
_python_format = warnings.formatwarning


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a command prints it: without the file, the line and its source, which are none of its user's."""
    return f"omnimix: warning: {visible(' '.join(str(message).split()))}\n"


# Level and propagation before the commands that run now, once for each.
_before: list[tuple[int, bool]] = []


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Within it, records from INFO on are printed, and bars show progress on terminals, as a command has it.

    Commands may run in several threads: the last that ends leaves the log as the first found it.
    """
    with _lock:
        if not _before:
            _ROOT.addHandler(_console)
            warnings.formatwarning = _one_line
        _before.append(_before[0] if _before else (_ROOT.level, _ROOT.propagate))
        _ROOT.setLevel(logging.INFO)
        # Packages that a command imports may print the root's records too.
        _ROOT.propagate = False
    try:
        yield
    finally:
        with _lock:
            level, propagate = _before.pop()
            if not _before:
                _ROOT.removeHandler(_console)
                warnings.formatwarning = _python_format
                _ROOT.setLevel(level)
                _ROOT.propagate = propagate


def _records(logger: logging.Logger, text: str, total: int) -> Callable[[int], None]:
    """What tells of each advance towards `total` by a record every ten seconds."""
    done, said = 0, time.monotonic()

    def advance(by: int) -> None:
        nonlocal done, said
        done += by
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            logger.info("%s: %d %%", text, 100 * done // max(1, total))

    return advance


@contextlib.contextmanager
def progress(
    logger: logging.Logger, text: str, total: int, *, level: int = logging.INFO
) -> Iterator[Callable[[int], None]]:
    """What is to be called with each advance towards `total`.

    It moves a bar on a command's terminal; elsewhere there is one record of this level, and one every ten seconds.
    """
    if _console not in _ROOT.handlers or not sys.stderr.isatty():
        logger.log(level, text)
        yield _records(logger, text, total)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(markup(text), total=total)
        yield lambda advance: bar.advance(task, advance)
