"""Configurations as plain dictionaries, lists and scalars, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import typing
from typing import Any, TypeVar, cast

from ..errors import ConfigError, UnknownName
from .registry import OPTIONS, REGISTRIES, lookup, required
from .typed import checked, hints_of, options

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
            own = vars(type(value))
            kind = {"type": own["type"]} if "type" in own else {}
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
    if other := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{cls.__name__} has no field {other[0]!r}; its fields have names")
    if (upgrade := getattr(cls, "upgrade", None)) is not None:
        values = upgrade(values)
    if "type" in values and values["type"] != getattr(cls, "type", None):
        own = getattr(cls, "type", cls.__name__)
        raise ConfigError(f"type is {values['type']!r}, and these are the options of {own!r}")
    values = {key: value for key, value in values.items() if key != "type"}
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(fields)}"
            raise ConfigError(f"{cls.__name__} has no field {key!r}; {hint}")
    if missing := [name for name in required(cls) if name not in values]:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    hints = hints_of(cls)
    return cls(**checked(cls, {key: restored(key, hints[key], value) for key, value in values.items()}))


def restored(key: str, hint: Any, value: Any) -> Any:
    """`value` as the field `key` with the type `hint` holds it."""
    if isinstance(value, list):
        element = next((a for option in options(hint) for a in typing.get_args(option) if a is not Ellipsis), Any)
        return tuple(restored(key, element, item) for item in value)
    if not isinstance(value, dict):
        return value
    if key in OPTIONS and "type" not in value:
        get = OPTIONS[key].get
        return {name: from_dict(get(name).config, v) if isinstance(v, dict) else v for name, v in value.items()}
    classes = [option for option in options(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return from_dict(_class_of(classes, value), value) if classes else value


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
