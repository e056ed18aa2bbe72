"""Registries of the parts of a block: mixers and channel layers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..errors import UnknownName

M = TypeVar("M")

# Fields of configurations that hold options by name -> the registry that knows their classes.
OPTIONS: dict[str, Registry[Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[M]):
    """A registered part.

    Args:
        name: what users write.
        build: `(dim, config, site) -> module`; the module's class.
        config: its options' dataclass.
        summary: one line.
        source: the paper.
        examples: small configurations, for a width of 32, on which the laws run; together they reach every branch.
    """

    name: str
    build: Callable[..., M]
    config: type
    summary: str
    source: str
    examples: tuple[Any, ...]


class Registry(Generic[M]):
    """The parts of one kind.

    Args:
        kind: what messages call one of them.
        options: the field of configurations that holds their options by name.
    """

    def __init__(self, kind: str, *, options: str):
        self.kind = kind
        self._entries: dict[str, Entry[M]] = {}
        OPTIONS[options] = self

    def register(
        self, name: str, config: type, *, summary: str, source: str, examples: tuple[Any, ...]
    ) -> Callable[[type], type]:
        """A class decorator that registers the class under `name`; see `Entry`."""

        def add(cls: type) -> type:
            if name in self._entries:
                raise ValueError(f"a {self.kind} called {name!r} is registered already")
            self._entries[name] = Entry(
                name=name, build=cls, config=config, summary=summary, source=source, examples=examples
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

    def build(self, name: str, dim: int, options: dict[str, Any], site: Any) -> M:
        entry = self.get(name)
        return entry.build(dim, options.get(name) or entry.config(), site)
