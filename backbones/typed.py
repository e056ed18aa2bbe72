"""Configurations whose fields hold what their types say."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch

from ..errors import ConfigError
from .registry import REGISTRIES

# Generic types of fields that hold tuples.
_LISTS = (tuple, list, Sequence)
# What a float can hold.
_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of configurations: dataclasses that refuse values of another type than their fields have.

    This happens before `__post_init__` of a subclass, which may rely on it. Lists and ranges become tuples, integers in
    fields of real numbers floats, and mappings the configurations that they describe.

    Raises:
        ConfigError: a value of another type, with the class, the field, the value and what is allowed.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Plain values alone: torch.load(weights_only=True) may read them.
        torch.serialization.add_safe_globals([cls])
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _after_types(cls.__post_init__)

    def __post_init__(self) -> None:
        _check_types(self)


def _after_types(own: Callable[[Any], None]) -> Any:
    @wraps(own)
    def __post_init__(self: Any) -> None:
        _check_types(self)
        own(self)

    return __post_init__


def _check_types(config: Any) -> None:
    # That module needs this one.
    from .serialization import restored

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    hints = hints_of(type(config))
    given = {n: restored(n, hints[n], v) if isinstance(v, dict) else v for n, v in values.items()}
    for name, held in checked(type(config), given).items():
        if held is not values[name]:
            object.__setattr__(config, name, held)


def checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of fields of a dataclass, as these hold them.

    Raises:
        ConfigError: a value of another type, with the class, the field, the value and what is allowed.
    """
    hints, found = hints_of(cls), {}
    for name, value in values.items():
        found[name] = _held(hints[name], value)
        if not _fits(hints[name], found[name]):
            raise ConfigError(f"{cls.__name__}.{name} is {value!r}; it must be {_described(hints[name], value)}")
    return found


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a class's fields."""
    return typing.get_type_hints(cls)


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _held(hint: Any, value: Any) -> Any:
    """`value` as a field of the type `hint` holds it."""
    listed = next((option for option in options(hint) if typing.get_origin(option) in _LISTS), None)
    if listed is not None and isinstance(value, list | tuple | range):
        each = _entries(listed, len(value))
        return tuple(map(_held, each, value)) if len(each) == len(value) else tuple(value)
    if type(value) is int and float in options(hint) and int not in options(hint) and abs(value) <= _LARGEST:
        return float(value)
    return value


def _entries(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the entries that a tuple or list of the type `hint` has, or should have, where it has `count`."""
    inner = typing.get_args(hint)
    return inner if typing.get_origin(hint) is tuple and inner[-1] is not Ellipsis else inner[:1] * count


def _fits(hint: Any, value: Any) -> bool:
    """Whether a field of the type `hint` may hold the value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin is typing.Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    if origin in _LISTS:
        if not isinstance(value, tuple):
            return False
        each = _entries(hint, len(value))
        return len(each) == len(value) and all(map(_fits, each, value))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(inner[0], key) and _fits(inner[1], item) for key, item in value.items()
        )
    if hint in (int, float):
        # NaN, infinity and what no float can hold are no values of any option, and JSON can hold them.
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        return number and abs(value) <= _LARGEST
    return not isinstance(hint, type) or isinstance(value, hint)


# What messages call the types of fields.
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a name", type(None): "null"}


def _described(hint: Any, value: Any) -> str:
    """What a field of the type `hint` may hold, and the nearest of several words."""
    texts: list[str] = []
    for option in options(hint):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is typing.Literal:
            near = difflib.get_close_matches(str(value), map(str, inner), n=1)
            hint_at = f" (did you mean {near[0]!r}?)" if near else ""
            texts.append(f"one of {', '.join(map(repr, inner))}{hint_at}")
        elif origin is tuple and inner[-1] is not Ellipsis:
            texts.append(f"a list of {len(inner)}, each {_described(inner[0], None)}")
        elif origin in _LISTS:
            texts.append(f"a list, each entry {_described(inner[0], None)}")
        elif origin is dict:
            texts.append(f"a mapping of names to {_described(inner[1], None)}")
        elif option in REGISTRIES:
            texts.append(
                f"the options of {'an' if REGISTRIES[option].kind[0] in 'aeiou' else 'a'} {REGISTRIES[option].kind}"
            )
        else:
            texts.append(_NAMES.get(option) or f"a {getattr(option, '__name__', option)}")
    return " or ".join(dict.fromkeys(texts))
