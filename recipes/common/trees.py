"""Configuration trees on the command line: `--model.backbone…`, `--model.objective…`, and the short forms of both.

jsonargparse sees such a tree as plain values. It is put together here from the defaults, the files and the flags, in
their order, and checked as a whole by the configurations themselves, which name what is wrong and the nearest option.
In files and in config.yaml a part says by `type` which one it is (`ffn: {type: moe, experts: 16}`); wherever a part is
named, its name ("moe") and that of its class ("MoEConfig") are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from typing import Any

import yaml

from ...backbones.config import BackboneConfig, FFNConfig, ObjectiveConfig, ResidualConfig
from ...backbones.registry import REGISTRIES, lookup
from ...backbones.serialization import from_dict, to_dict
from ...errors import ConfigError

# What is short for what: `--model.dim 64` is `--model.backbone.dim 64`.
SHORT = {
    "mixer": ("backbone", "pattern"),
    **{name: ("backbone", name) for name in ("dim", "depth", "ffn", "mixers", "scan", "drop_path")},
}
EPILOG = """The backbone is a tree: --model.backbone.FIELD sets a field of BackboneConfig, and PART.OPTION an option
of a part: --model.backbone.residual sandwich, --model.backbone.pattern '[gla, {mixer: {type: gla, heads: 2}}]'.
Short forms: --model.mixer gla,attention (its pattern), --model.dim, --model.depth, --model.ffn moe,
--model.ffn.experts 16 (an option of the chosen ffn), --model.mixers.gla.heads 2, --model.scan, --model.drop_path.
In files: ffn: {type: moe, experts: 16}."""


# Arguments of recipes that are trees.
TREES = {"backbone": BackboneConfig, "objective": ObjectiveConfig}
# Where in them there is one part, whose options may be set one by one.
PARTS = {
    ("backbone", "ffn"): FFNConfig,
    ("backbone", "residual"): ResidualConfig,
    ("objective",): ObjectiveConfig,
}


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def tree_defaults(model: type) -> dict[str, Any]:
    """The arguments of a recipe that are trees, with their defaults as plain values."""
    parameters = inspect.signature(model).parameters
    defaults = {name: to_dict(parameters[name].default) for name in TREES if name in parameters}
    return {name: {"type": value} if isinstance(value, str) else value for name, value in defaults.items()}


class Trees:
    """The trees of one command line, while they are put together.

    Args:
        model: the recipe's module.
    """

    def __init__(self, model: type):
        self.values = tree_defaults(model)
        self._scan = self.values["backbone"]["scan"]

    def place(self, path: list[str]) -> list[str] | None:
        """Where in a tree an option of the model belongs, short forms written out; None where it belongs to none."""
        if path[0] in SHORT:
            return [*SHORT[path[0]], *path[1:]]
        return path if path[0] in self.values else None

    def take(self, content: Any) -> Any:
        """Merge what a file says of the trees, and return the rest of it."""
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            return content
        rest = {}
        for key, value in content["model"].items():
            place = self.place([key])
            if place is None:
                rest[key] = value
            else:
                self.merge(place, value)
        return content | {"model": rest}

    def flag(self, word: str, place: list[str], value: str) -> None:
        """Merge `--model.PATH value`."""
        try:
            content = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word}: cannot read {value!r}: {' '.join(str(error).split())}") from error
        self.merge(place, content)

    def merge(self, place: list[str], value: Any) -> None:
        """Set what is at a place; a mapping changes only what it names, unless it is one of another `type`."""
        if place == ["backbone", "scan"] and value is None:
            value = self._scan
        node = self.values
        for key in place[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        key, value = place[-1], _plain(place, value)
        before = node.get(key)
        if isinstance(value, dict) and value and isinstance(before, dict):
            if value.get("type", before.get("type")) == before.get("type"):
                for name, inner in value.items():
                    self.merge([*place, name], inner)
                return
        node[key] = value

    def checked(self) -> dict[str, Any]:
        """All trees, as plain values of which the configurations can be made.

        Raises:
            ConfigError, UnknownName: one cannot, with the nearest name.
        """
        for (*path, last), base in PARTS.items():
            node = self.values
            for key in path:
                node = node.get(key) if isinstance(node, dict) else None
            if isinstance(node, dict) and isinstance(node.get(last), dict):
                _check_part(base, last, node[last])
        return {name: to_dict(build(name, value)) for name, value in self.values.items()}


def _check_part(base: type, place: str, part: dict[str, Any]) -> None:
    """Options of a part that was not chosen: say which one has them."""
    kind, what = part.get("type"), REGISTRIES[base].kind
    known = set() if kind is None else fields_of(lookup(base, kind).config)
    entries = [REGISTRIES[base].get(name) for name in REGISTRIES[base].names()]
    for option in part.keys() - {"type", *known}:
        near = difflib.get_close_matches(option, [f for entry in entries for f in fields_of(entry.config)], n=1)
        having = [entry.name for entry in entries if near and near[0] in fields_of(entry.config)]
        if kind in having or not having:
            return  # its own configuration says what is wrong
        chosen = f"there is no {what}" if kind is None else f"{place} {kind!r} has no option {option!r}"
        raise ConfigError(
            f"{chosen}; {near[0]!r} is one of {' and '.join(map(repr, having))}: add --model.{place} {having[0]}"
        )


def fields_of(config: type) -> set[str]:
    """The names of a configuration's fields."""
    return {field.name for field in dataclasses.fields(config)}


def build(name: str, value: Any) -> Any:
    """The object that the recipe's argument `name` takes, from its plain values."""
    base = TREES[name]
    if base is BackboneConfig:
        return from_dict(base, value)
    if not isinstance(value, dict) or "type" not in value:
        raise ConfigError(f"model.{name} is {value!r}; it must say by its name or by 'type' which one")
    return from_dict(lookup(base, value["type"]).config, value)


def part_name(name: str) -> str:
    """The name of the part that is named, or whose configuration's class or class path is."""
    found = {c.__name__: c.type for c in all_parts()}
    return found.get(name.rpartition(".")[2], name)


def all_parts() -> list[type]:
    """The classes of all registered parts' configurations."""
    return [registry.get(name).config for registry in REGISTRIES.values() for name in registry.names()]


def _plain(place: list[str], value: Any) -> Any:
    """A value as a tree holds it: what names a part does so by its `type`."""
    key = place[-1]
    if isinstance(value, dict) and "class_path" in value:
        value = {"type": value["class_path"], **(value.get("init_args") or {})}
    if key in ("ffn", "mixer") and value == "none":
        return None
    if key == "pattern" and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        return [_plain([key, ""], entry) for entry in value]
    if isinstance(value, dict):
        value = {name: _plain([*place, name], inner) for name, inner in value.items()}
        return value | {"type": part_name(value["type"])} if isinstance(value.get("type"), str) else value
    if not isinstance(value, str) or key not in ("mixer", "ffn", "residual", "transition", "objective"):
        return value
    base = PARTS.get(tuple(place))
    return part_name(value) if base is None else {"type": lookup(base, part_name(value)).name}
