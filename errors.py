"""The exceptions that omnimix raises on purpose. Each message names the argument, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OmnimixError(Exception):
    """Base of every error that omnimix raises on purpose."""


class UnknownName(OmnimixError, ValueError):
    """A name that no registry holds."""

    def __init__(self, kind: str, name: object, known: Iterable[str]):
        known = sorted(known)
        by_case = {word.lower(): word for word in known}
        near = [by_case[word] for word in difflib.get_close_matches(str(name).lower(), by_case, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class ConfigError(OmnimixError, ValueError):
    """A configuration whose values cannot work together."""


class UnsupportedShape(OmnimixError, ValueError):
    """An argument whose shape or dtype cannot be served."""


class UnsupportedCall(OmnimixError, NotImplementedError):
    """A capability that is declared missing was asked for."""


class BackendUnavailable(OmnimixError, RuntimeError):
    """A named kernel backend cannot serve the call, with the reason."""


class NotFinite(OmnimixError, ArithmeticError):
    """NaN or infinity where a result depends on numbers: weights or inputs that hold some, or values that overflow."""


class MediaError(OmnimixError, OSError):
    """An image, video, audio or text file that cannot be read."""


class OutputError(OmnimixError, OSError):
    """A file that is to be written cannot be."""


class CheckpointError(OmnimixError, RuntimeError):
    """A checkpoint or weights file that is corrupt or does not fit; nothing of it has been loaded."""


class LostProcess(OmnimixError, RuntimeError):
    """A process that works for this one, or together with it, has ended."""


class MissingPackage(OmnimixError, ImportError):
    """An optional package is needed, with the command that installs it."""

    def __init__(self, package: str, purpose: str, extra: str | None = None):
        command = f"pip install '.[{extra}]' (in the clone of omnimix)" if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package!r}: {command}")
