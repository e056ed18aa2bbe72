"""Old names of options, which keep working for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from ..errors import ConfigError

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, level: int = 2) -> None:
    """Say that an option has another name now.

    Args:
        level: of the caller that is to be named; 1 is the function that calls this one.
    """
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", FutureWarning, stacklevel=level + 1)


def renamed_options(**names: str) -> Callable[[C], C]:
    """Let a configuration take and give its options by their old names too, with a FutureWarning.

    What was stored by the old names is read without one, through the class's `upgrade`.

    Args:
        names: the new name for each old one.
    """

    def decorated(cls: C) -> C:
        own, earlier = cls.__init__, getattr(cls, "upgrade", None)

        @wraps(own)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            for old in names.keys() & values.keys():
                new = names[old]
                if new in values:
                    raise ConfigError(f"{cls.__name__}.{old} is the old name of {new}; give one of them")
                warn_renamed(f"{cls.__name__}.{old}", new)
                values[new] = values.pop(old)
            own(self, *args, **values)

        cls.__init__ = __init__
        cls.renamed = names
        cls.upgrade = staticmethod(lambda values: new_names(earlier(values) if earlier else values, names))
        for old, new in names.items():
            setattr(cls, old, property(_reader(cls.__name__, old, new)))
        return cls

    return decorated


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Let a function take keyword arguments by their old names too, with a FutureWarning.

    Args:
        names: the new name for each old one.
    """

    def decorated(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **values: Any) -> Any:
            for old in names.keys() & values.keys():
                if names[old] in values:
                    raise ConfigError(f"{function.__name__}: {old} is the old name of {names[old]}; give one of them")
                warn_renamed(f"{function.__name__}({old}=)", names[old])
                values[names[old]] = values.pop(old)
            return function(*args, **values)

        return cast(F, call)

    return decorated


def new_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options by their new names; where both are given the new one counts."""
    renamed = {names[name]: value for name, value in values.items() if name in names}
    return {**renamed, **{name: value for name, value in values.items() if name not in names}}


def _reader(cls: str, old: str, new: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        warn_renamed(f"{cls}.{old}", new)
        return getattr(self, new)

    return read
