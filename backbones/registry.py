"""Registries of parts by name, and of their configurations, which know the part that they configure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..errors import ConfigError, UnknownName

M = TypeVar("M")
C = TypeVar("C", bound=type)

# Fields of configurations that hold options by name -> the registry that knows their classes.
OPTIONS: dict[str, Registry[Any]] = {}
# Base class of configurations -> the registry of the parts that they configure.
REGISTRIES: dict[type, Registry[Any]] = {}
# Class of a configuration -> the entry of its part.
_ENTRIES: dict[type, Entry[Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[M]):
    """A registered part.

    Args:
        name: what users write.
        build: `(dim, config, site) -> module`; the module's class.
        config: its options' dataclass.
        summary: one line.
        source: the paper.
        examples: small configurations, for a width of 48, on which the laws run; together they reach every branch.
        reference: of mixers, `(mixer, config, x, causal) -> y`, the definition that law 12 holds them to; see
            `mixers/reference`.
    """

    name: str
    build: Callable[..., M]
    config: type
    summary: str
    source: str
    examples: tuple[Any, ...]
    reference: Callable[..., Any] | None = None


class Registry(Generic[M]):
    """The parts of one kind.

    Args:
        kind: what messages call one of them.
        base: base class of their configurations.
        options: the field of configurations that holds their options by name, where there is one.
    """

    def __init__(self, kind: str, *, base: type, options: str | None = None):
        self.kind = kind
        self._entries: dict[str, Entry[M]] = {}
        REGISTRIES[base] = self
        if options is not None:
            OPTIONS[options] = self

    def register(
        self,
        name: str,
        config: type,
        *,
        summary: str,
        source: str,
        examples: tuple[Any, ...],
        reference: Callable[..., Any] | None = None,
    ) -> Callable[[C], C]:
        """A class decorator that registers the class under `name`; see `Entry`."""

        def add(cls: C) -> C:
            if name in self._entries:
                raise ValueError(f"a {self.kind} called {name!r} is registered already")
            if config in _ENTRIES:
                raise ValueError(f"{config.__name__} configures {config.type!r} already; derive a class for {name!r}")
            config.type = name
            self._entries[name] = _ENTRIES[config] = Entry(
                name=name,
                build=cls,
                config=config,
                summary=summary,
                source=source,
                examples=examples,
                reference=reference,
            )
            # A checkpoint may hold the options as an object; torch.load(weights_only=True) then knows the class.
            torch.serialization.add_safe_globals([config])
            return cls

        return add

    def get(self, name: str) -> Entry[M]:
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)


def entry_of(config: Any) -> Entry[Any]:
    """The entry of the part that a configuration describes.

    Raises:
        ConfigError: it describes no registered part.
    """
    entry = _ENTRIES.get(type(config))
    if entry is None:
        raise ConfigError(f"{config!r} configures no registered part; pass a name, or a configuration of one")
    return entry


def lookup(base: type, name: str) -> Entry[Any]:
    """The entry called `name` among the parts whose configurations derive from `base`.

    Raises:
        UnknownName: there is none.
    """
    registries = [registry for root, registry in REGISTRIES.items() if issubclass(root, base)]
    for registry in registries:
        if name in registry.names():
            return registry.get(name)
    raise UnknownName(REGISTRIES[base].kind, name, [known for registry in registries for known in registry.names()])


def required(config: type) -> list[str]:
    """The fields of a configuration that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(config) if f.default is missing and f.default_factory is missing]


def build_part(config: Any, dim: int, *arguments: Any) -> Any:
    """The part that a configuration describes, for tokens of width `dim`."""
    return entry_of(config).build(dim, config, *arguments)
