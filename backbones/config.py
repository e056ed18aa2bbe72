"""Configurations: frozen dataclasses that check themselves, and their way to and from plain dictionaries."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import ConfigError
from .registry import OPTIONS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of every mixer's options."""


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """Base of the options of the other half of a block."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Base of the options of a language model's objective."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where in a backbone a layer stands; some mixers initialise by it.

    Args:
        layer: its index, from 0.
        depth: how many layers there are.
        scan: the orders in which a mixer that only looks backwards runs over the tokens; see wrappers/scan.py.
        norm_eps: of every normalisation.
    """

    layer: int = 0
    depth: int = 1
    scan: tuple[str, ...] = ("forward",)
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of blocks.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        pattern: mixers by name, tiled over the depth: `("gla", "gla", "gla", "attention")`. A name with "+" runs its
            mixers in parallel and adds them: "attention+mamba2" (Hymba).
        mixers: options by mixer name; a mixer without an entry has its defaults.
        channel: what follows each mixer: "swiglu", "mlp", "moe" or None.
        channels: options by channel name.
        scan: the set of scan orders for mixers that only look backwards: "forward" (the causal one), "both", "cross",
            "snake", "window", "hilbert", "temporal-first", "cross-3d", or several orders joined by commas.
        drop_path: stochastic depth, growing linearly from 0 to this rate in the last block.
        norm_eps: of every normalisation.
    """

    dim: int
    depth: int
    pattern: tuple[str, ...] | list[str] = ("gla",)
    mixers: dict[str, MixerConfig] = field(default_factory=dict)
    channel: str | None = "swiglu"
    channels: dict[str, ChannelConfig] = field(default_factory=dict)
    scan: str = "forward"
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        from .channel import get_channel
        from .mixers import get_mixer
        from .wrappers.scan import scan_orders

        positive(self, "dim", "depth")
        if isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(f"pattern is {self.pattern!r}; it must be a list of mixer names, such as ['gla']")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        named = {part for entry in self.pattern for part in entry.split("+")}
        for name in named:
            get_mixer(name)
        check_options("mixers", self.mixers, {name: get_mixer(name).config for name in self.mixers})
        if self.channel is not None:
            get_channel(self.channel)
        check_options("channels", self.channels, {name: get_channel(name).config for name in self.channels})
        scan_orders(self.scan)
        fraction(self, "drop_path")

    def site(self, layer: int) -> Site:
        from .wrappers.scan import scan_orders

        return Site(layer=layer, depth=self.depth, scan=scan_orders(self.scan), norm_eps=self.norm_eps)


def positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is at least 1 (or None)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{type(config).__name__}.{name} is {value}; it must be at least 1")


def fraction(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be in [0, 1)")


def divides(config: Any, name: str, total: int, what: str) -> None:
    """Raise ConfigError unless the named field divides `total`."""
    value = getattr(config, name)
    if value is not None and total % value:
        raise ConfigError(f"{type(config).__name__}.{name} is {value}; it must divide {what}, {total}")


def check_options(argument: str, options: dict[str, Any], expected: dict[str, type]) -> None:
    for name, kind in expected.items():
        if not isinstance(options[name], kind):
            raise ConfigError(f"{argument}[{name!r}] is a {type(options[name]).__name__}; it must be a {kind.__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as plain dictionaries, lists and scalars, ready for JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return plain(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: a key that `cls` does not have, with the nearest one, or values that do not fit.
    """
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
    hints = _type_hints(cls)
    return cls(**{key: _restore(key, hints[key], value) for key, value in values.items()})


def _restore(key: str, hint: Any, value: Any) -> Any:
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if key in OPTIONS and isinstance(value, dict):
        get = OPTIONS[key].get
        return {name: from_dict(get(name).config, v) if isinstance(v, dict) else v for name, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _type_hints(cls: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(cls)
