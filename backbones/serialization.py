"""Configurations as plain dictionaries, lists and scalars, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Any, TypeVar

from ..errors import ConfigError, UnknownName
from .registry import OPTIONS, REGISTRIES, lookup

T = TypeVar("T")

# What version 0.1 called the parts of a block.
RENAMED = {"mixer_norm": "mixer_residual.norm", "channel_norm": "ffn_residual.norm", "channel": "ffn"}


def current_name(name: str, inside: str = r"(?:.*\.)?blocks\.\d+\.") -> str:
    """A parameter's name, from the one that an earlier version gave it.

    Args:
        inside: a pattern of what precedes the names inside a block; by default those of the blocks of any model.
    """
    found = re.match(rf"({inside})({'|'.join(RENAMED)})\.", name)
    return name if found is None else f"{found[1]}{RENAMED[found[2]]}.{name[found.end() :]}"


def to_dict(config: Any) -> Any:
    """A dataclass, nested ones included, ready for JSON; those of registered parts say which by `type`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            kind = {"type": value.type} if "type" in vars(type(value)) else {}
            return kind | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return plain(config)


def from_dict(cls: type[T], values: Any) -> T:
    """The inverse of `to_dict`; what earlier versions wrote is brought up to date by the class's `upgrade`.

    Raises:
        ConfigError: a key that `cls` does not have, with the nearest one, or values that do not fit.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} must be a mapping of its fields, not {values!r}")
    if hasattr(cls, "upgrade"):
        values = cls.upgrade(values)
    if "type" in values and values["type"] != getattr(cls, "type", None):
        own = getattr(cls, "type", cls.__name__)
        raise ConfigError(f"type is {values['type']!r}, and these are the options of {own!r}")
    values = {key: value for key, value in values.items() if key != "type"}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(fields)}"
            raise ConfigError(f"{cls.__name__} has no field {key!r}; {hint}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    restored = {key: _restore(key, hints[key], value) for key, value in values.items()}
    for key, value in restored.items():
        if not _fits(hints[key], value):
            raise ConfigError(f"{cls.__name__}.{key} is {value!r}; it must be {_described(hints[key], value)}")
    return cls(**restored)


def _restore(key: str, hint: Any, value: Any) -> Any:
    """`value` as the field `key` with the type `hint` holds it."""
    if isinstance(value, list):
        element = next((a for option in _options(hint) for a in typing.get_args(option) if a is not Ellipsis), Any)
        return tuple(_restore(key, element, item) for item in value)
    if type(value) is int and float in _options(hint) and int not in _options(hint):
        return float(value)
    if not isinstance(value, dict):
        return value
    if key in OPTIONS and "type" not in value:
        get = OPTIONS[key].get
        return {name: from_dict(get(name).config, v) if isinstance(v, dict) else v for name, v in value.items()}
    classes = [option for option in _options(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return from_dict(_class_of(classes, value), value) if classes else value


# What messages call the types of fields.
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a name", type(None): "null"}


def _fits(hint: Any, value: Any) -> bool:
    """Whether a field of the type `hint` may hold the value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (tuple, list):
        if not isinstance(value, tuple):
            return False
        each = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
        return len(each) == len(value) and all(map(_fits, each, value))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(inner[1], item) for item in value.values())
    if hint in (int, float):
        # NaN and infinity are no values of any option, and JSON can hold them.
        return isinstance(value, int | hint) and not isinstance(value, bool) and abs(value) < math.inf
    return not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any, value: Any) -> str:
    """What a field of the type `hint` may hold, and the nearest of several words."""
    texts: list[str] = []
    for option in _options(hint):
        words = typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()
        near = difflib.get_close_matches(str(value), map(str, words), n=1)
        if words:
            texts.append(f"one of {', '.join(map(repr, words))}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        elif typing.get_origin(option) in (tuple, list):
            texts.append("a list")
        elif option in REGISTRIES:
            texts.append(f"the options of a {REGISTRIES[option].kind}")
        else:
            texts.append(_NAMES.get(option) or f"a {getattr(option, '__name__', option)}")
    return " or ".join(dict.fromkeys(texts))


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _class_of(classes: list[type], value: dict[str, Any]) -> type:
    """The class that a mapping describes: the one that its `type` names, where several derive from one of `classes`."""
    bases = [cls for cls in classes if cls in REGISTRIES]
    if not bases:
        return classes[0]
    if "type" not in value:
        raise ConfigError(f"{value!r} must say by 'type' which {REGISTRIES[bases[0]].kind} it configures")
    for base in bases[:-1]:
        with contextlib.suppress(UnknownName):
            return lookup(base, value["type"]).config
    return lookup(bases[-1], value["type"]).config
