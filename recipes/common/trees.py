"""Configuration trees on the command line: `--model.backbone…`, `--data.loading…`, and the short forms of all.

jsonargparse sees such a tree as plain values. It is put together here from the defaults, the files and the flags, in
their order, and checked as a whole by the configurations themselves, which name what is wrong and the nearest option.
In files and in config.yaml a part says by `type` which one it is (`ffn: {type: moe, experts: 16}`); wherever a part is
named, its name ("moe") and that of its class ("MoEConfig") are the same.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import re
from typing import Any

import yaml

from ...backbones.config import BackboneConfig, FFNConfig, ObjectiveConfig, ResidualConfig, scanning
from ...backbones.registry import REGISTRIES, lookup
from ...backbones.serialization import from_dict, to_dict
from ...errors import ConfigError
from ...modalities.audio.fronts import FrontConfig
from ...modalities.common.classifier import ShortForm
from ...utils.renamed import warn_renamed
from .migration import RENAMED, RENAMED_ARGUMENTS
from .options import RecipeData, options_argument

# What is short for what: `--model.dim 64` is `--model.backbone.dim 64`.
SHORT = {
    "mixer": ("backbone", "pattern"),
    **{name: ("backbone", name) for name in ShortForm.__annotations__ if name != "mixer"},
}
EPILOG = """The backbone is a tree: --model.backbone.FIELD sets a field of BackboneConfig, and PART.OPTION an option
of a part: --model.backbone.residual sandwich, --model.backbone.pattern '[gla, {mixer: {type: gla, heads: 2}}]'.
Short forms: --model.mixer gla,attention (its pattern), --model.dim, --model.depth, --model.ffn moe,
--model.ffn.experts 16 (an option of the chosen ffn), --model.mixers.gla.heads 2, --model.scan, --model.drop_path.
In files: ffn: {type: moe, experts: 16}."""


# Arguments of recipes that are trees.
TREES = {"backbone": BackboneConfig, "objective": ObjectiveConfig, "front": FrontConfig}
# Where in them there is one part, whose options may be set one by one.
PARTS = {
    ("backbone", "ffn"): FFNConfig,
    ("backbone", "residual"): ResidualConfig,
    ("objective",): ObjectiveConfig,
    ("front",): FrontConfig,
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
    starts = starts_of(model)
    return {
        name: starts.get(name, {}).get(value, {"type": value}) if isinstance(value, str) else value
        for name, value in defaults.items()
    }


def starts_of(model: type) -> dict[str, dict[str, Any]]:
    """What a recipe's parts are where they are named, as plain values by argument and name; others have defaults."""
    starts = getattr(model, "starts", {})
    return {name: {kind: to_dict(part) for kind, part in parts.items()} for name, parts in starts.items()}


class Trees:
    """The trees of the model of one command line, while they are put together.

    Args:
        model: the recipe's module.
    """

    short = SHORT

    def __init__(self, model: type):
        self.values, self._starts = tree_defaults(model), starts_of(model)
        self._scan = self.values["backbone"]["scan"]

    def current(self, option: str) -> str:
        """An option of the command line by the name that it has now, with a warning where it had another."""
        section, _, name = option.partition(".")
        if section != "--model" or name not in RENAMED_ARGUMENTS:
            return option
        warn_renamed(option, new := f"{section}.{RENAMED_ARGUMENTS[name]}")
        return new

    def path(self, option: str) -> list[str] | None:
        """Where in a tree an option of the command line belongs; None where it belongs to none."""
        section, *path = option.split(".")
        return self.place(path) if section == "--model" and path else None

    def place(self, path: list[str]) -> list[str] | None:
        """Where in a tree an option of the model belongs, short forms written out; None where it belongs to none."""
        if path[0] in self.short:
            return [*self.short[path[0]], *path[1:]]
        return path if path[0] in self.values else None

    def take(self, content: Any) -> Any:
        """Merge what a file says of the trees, and return the rest of it."""
        if not isinstance(content, dict) or content.get("model") is None:
            return content
        if not isinstance(content["model"], dict):
            raise ConfigError(f"model is {content['model']!r}; it must be a mapping of its options")
        return content | {"model": self._rest(content["model"])}

    def _rest(self, values: dict[str, Any]) -> dict[str, Any]:
        """Merge what belongs to the trees, and return what does not."""
        rest = {}
        for key, value in values.items():
            place = self.place([key])
            if place is None:
                rest[key] = value
            else:
                self.merge(place, value)
        return rest

    def flag(self, word: str, place: list[str], value: str) -> None:
        """Merge `--model.PATH value`."""
        try:
            content = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word}: cannot read {value!r}: {' '.join(str(error).split())}") from error
        if place[:-1] == ["objective"] and place[-1] in RENAMED:
            warn_renamed(word, new := word.removesuffix(place[-1]) + RENAMED[place[-1]])
            place = [*place[:-1], new.rpartition(".")[2]]
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
        kind, was = (part.get("type") if isinstance(part, dict) else None for part in (value, before))
        if len(place) == 1 and kind != was and kind in self._starts.get(key, {}):
            before = node[key] = copy.deepcopy(self._starts[key][kind])
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
        backbone = self.values["backbone"]
        if isinstance(backbone, dict) and backbone.get("scan") == self._scan != "bidirectional":
            # The recipe starts with it, for mixers that scan; nobody has asked for it.
            layers = build("backbone", backbone | {"scan": "forward"}).layers
            backbone["scan"] = self._scan if any(map(scanning, layers)) else "forward"
        return {name: to_dict(build(name, value)) for name, value in self.values.items()}


class DataTrees(Trees):
    """The options that data sets share, of one command line: `--data.batch_size` is `--data.loading.batch_size`.

    Args:
        data: the data set that is chosen.
    """

    def __init__(self, data: type[RecipeData]):
        self.data, self.name = data, options_argument(data)
        self.values, self._starts = {self.name: {}}, {}
        self._old = {old: (self.name, new) for old, new in renamed_of(data).items()}
        self.short = {**short_forms(data), **self._old}

    def path(self, option: str) -> list[str] | None:
        section, *path = option.split(".")
        path = path[1:] if path[:1] == ["init_args"] else path
        return self.place(path) if section == "--data" and path else None

    def flag(self, word: str, place: list[str], value: str) -> None:
        if (old := word.rpartition(".")[2]) in self._old:
            warn_renamed(word, word.removesuffix(old) + self._old[old][1])
        super().flag(word, place, value)

    def take(self, content: Any) -> Any:
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("init_args"), dict):
            return content
        named = str(data.get("class_path") or self.data.__name__)
        chosen = named.rpartition(".")[2] == self.data.__name__
        # Options of another data set are dropped, as those of another part are.
        rest = (self if chosen else DataTrees(self.data))._rest(data["init_args"])
        return content | {"data": data | {"init_args": rest}}

    def checked(self) -> dict[str, Any]:
        options = from_dict(type(self.data.defaults), self.values[self.name])
        if options.seed is not None:
            raise ConfigError(f"data.seed is {options.seed}, but the run has one for all: set --seed_everything")
        options = self.data.filled(options)
        # The seed is linked to the run's.
        return {self.name: {name: value for name, value in to_dict(options).items() if name != "seed"}}


def short_forms(data: type[RecipeData]) -> dict[str, tuple[str, str]]:
    """What is short for what among the options of a data set."""
    name = options_argument(data)
    return {field: (name, field) for field in fields_of(type(data.defaults))}


def renamed_of(data: type[RecipeData]) -> dict[str, str]:
    """The new names of the options of a data set that had others before."""
    return getattr(type(data.defaults), "renamed", {})


def epilog(data: type[RecipeData]) -> str:
    """What the help of a recipe says of the options that its data sets share."""
    name = options_argument(data)
    words = ", ".join(f"--data.{field}" for field in short_forms(data) if field != "seed")
    return (
        f"All data sets take {words}, short for --data.{name}.OPTION; --data.help=NAME says what they are by default, "
        "and what else the data set NAME takes."
    )


def _check_part(base: type, place: str, part: dict[str, Any]) -> None:
    """Options of a part that was not chosen: say which one has them."""
    kind, what = part.get("type"), REGISTRIES[base].kind
    known = [] if kind is None else fields_of(lookup(base, kind).config)
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


def fields_of(config: type) -> list[str]:
    """The names of a configuration's fields."""
    return [field.name for field in dataclasses.fields(config)]


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
    if not isinstance(value, str) or key not in ("mixer", "ffn", "residual", "transition", "objective", "front"):
        return value
    base = PARTS.get(tuple(place))
    return part_name(value) if base is None else {"type": lookup(base, part_name(value)).name}
