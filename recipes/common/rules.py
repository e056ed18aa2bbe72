"""Options that follow from the data.

An option that is null in a packaged configuration, and that the recipe's rule knows, gets its value from the rule
before anything is parsed. From then on it is a plain value like any other: it is stored with the run, so that
`--resume` and `validate` repeat it, and a value on the command line or in a file takes the place of the rule's. `null`
there gives the choice back to the rule.

A recipe has a rule by passing one to `RecipeCLI`, and leaves options to it by setting them to null in its
configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ...utils.console import emit, say
from .options import RecipeData

# What the table says of a value that a user or a configuration has set.
GIVEN = "as given"
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The value of an option.

    Args:
        option: its whole name, such as "model.training.lr".
        value: a plain value.
        reason: why, for the table that a run prints.
    """

    option: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a rule says of a run before it begins.

    Args:
        notes: lines on the data.
        decisions: the options that the rule knows; none where nothing was left to it.
    """

    notes: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

    def show(self) -> None:
        """Print it."""
        for note in self.notes:
            say(note)
        if self.decisions:
            rows = [vars(each) | {"value": json.dumps(each.value)} for each in self.decisions]
            emit("chosen for this data; every option can be set", rows)


# A value, and the reason for it.
Choice = tuple[Any, str]
# From what is known of the data and the values of the options so far.
Choose = Callable[[Any, Mapping[str, Any]], Choice]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the options of a recipe follow from its data.

    Args:
        facts: what is known of the data, from the class of the data set and its options as plain values; it is asked
            once, and only where something is to be chosen. Its `notes()` are lines to print.
        choices: by the whole name of an option, with that of the tree or group that holds it ("model.backbone.dim",
            "data.loading.batch_size"), how its value follows; in an order in which each may depend on those before.
    """

    facts: Callable[[type[RecipeData], Mapping[str, Any]], Any]
    choices: Mapping[str, Choose]


def decide(rule: Rule, facts: Any, given: Mapping[str, Any]) -> list[Decision]:
    """The values of the rule's options, each with its reason.

    Args:
        facts: what is known of the data.
        given: the options that the configuration has, by name; those that are None are chosen, and those that it does
            not have are left alone.
    """
    values, found = dict(given), []
    for option, choose in rule.choices.items():
        if option not in given:
            continue
        value, reason = (given[option], GIVEN) if given[option] is not None else choose(facts, values)
        values[option] = value
        found.append(Decision(option=option, value=value, reason=reason))
    return found


class Layers:
    """What a command line says outside the trees of the model and the data: defaults, then words in their order.

    Args:
        defaults: of the recipe, as plain values.
        words: the command line, with configurations as text in place of files.
    """

    def __init__(self, defaults: dict[str, Any], words: list[str]):
        self.defaults, self.words = defaults, words

    def get(self, option: str) -> Any:
        """The value that counts, None for null; `_ABSENT` where no layer has it."""
        found = _at(self.defaults, option)
        for _, content in self._contents():
            inner = _at(content, option)
            found = found if inner is _ABSENT else inner
        for value in self._flags(option):
            found = yaml.safe_load(value)
        return found

    def put(self, option: str, value: Any) -> None:
        """Make a value the default, and leave out what the words say of the option."""
        _set(self.defaults, option, value)
        for i, content in self._contents():
            if _at(content, option) is not _ABSENT:
                _drop(content, option)
                data = self.words[i - 1] == "--data"
                self.words[i] = json.dumps(content["data"]) if data else yaml.safe_dump(content, width=1 << 30)
        kept, words = [], iter(self.words)
        for word in words:
            name, equals, _ = word.partition("=")
            if name not in _names(option):
                kept.append(word)
            elif not equals:
                next(words, None)
        self.words[:] = kept

    def _contents(self) -> list[tuple[int, Any]]:
        """The mappings among the words, with their places."""
        found = []
        for i, word in enumerate(self.words[:-1], start=1):
            if word in ("--config", "--data") and (word == "--config" or self.words[i].lstrip().startswith("{")):
                content = yaml.safe_load(self.words[i])
                found.append((i, content if word == "--config" else {"data": content}))
        return found

    def _flags(self, option: str) -> list[str]:
        found = []
        for i, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name in _names(option):
                found.append(value if equals else " ".join(self.words[i + 1 : i + 2]))
        return found


def _keys(option: str) -> list[str]:
    section, *rest = option.split(".")
    return [section, *(["init_args"] if section == "data" else []), *rest]


def _names(option: str) -> tuple[str, ...]:
    """What an option is called on a command line."""
    return f"--{option}", "--" + ".".join(_keys(option))


def _at(content: Any, option: str) -> Any:
    for key in _keys(option):
        if not isinstance(content, dict) or key not in content:
            return _ABSENT
        content = content[key]
    return content


def _set(content: dict[str, Any], option: str, value: Any) -> None:
    *path, last = _keys(option)
    for key in path:
        content = content.setdefault(key, {})
    content[last] = value


def _drop(content: Any, option: str) -> None:
    *path, last = _keys(option)
    for key in path:
        content = content[key]
    del content[last]


def left_open(rule: Rule, layers: Layers, trees: tuple[Any, ...]) -> list[str]:
    """The options that a packaged configuration leaves to the rule: those that are null in it.

    Args:
        layers: its values outside the trees, and no words.
        trees: of the model and of the data, before a user's values are merged.
    """
    return [option for option in rule.choices if _value(option, layers, trees) is None]


def fill(rule: Rule, data: type[RecipeData], options: list[str], layers: Layers, trees: tuple[Any, ...]) -> Plan:
    """Give every option that is left to the rule, and that is still null, its value.

    Args:
        data: the class of the data set.
        options: those that are left to the rule.
        layers: what is outside the trees.
        trees: of the model and of the data (see trees.py).
    """
    given = {option: _value(option, layers, trees) for option in options}
    if all(value is not None for value in given.values()):
        return Plan()
    facts = rule.facts(data, _options_of_data(layers))
    decisions = decide(rule, facts, given)
    for decision in decisions:
        if given[decision.option] is None:
            owner = _owner(decision.option, trees)
            if owner is None:
                layers.put(decision.option, decision.value)
            else:
                owner[0].merge(owner[1], decision.value)
    return Plan(notes=tuple(facts.notes()), decisions=tuple(decisions))


def _value(option: str, layers: Layers, trees: tuple[Any, ...]) -> Any:
    owner = _owner(option, trees)
    return layers.get(option) if owner is None else _at_place(*owner)


def _owner(option: str, trees: tuple[Any, ...]) -> tuple[Any, list[str]] | None:
    return next(((each, place) for each in trees if (place := each.path(f"--{option}"))), None)


def _at_place(tree: Any, place: list[str]) -> Any:
    value = tree.values
    for key in place:
        if not isinstance(value, dict) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _options_of_data(layers: Layers) -> dict[str, Any]:
    """What the layers say of the data set itself, by name."""
    found: dict[str, Any] = {}
    sources = [layers.defaults, *(content for _, content in layers._contents())]
    for source in sources:
        data = source.get("data") if isinstance(source, dict) else None
        if isinstance(data, dict) and isinstance(data.get("init_args"), dict):
            found |= data["init_args"]
    for i, word in enumerate(layers.words):
        name, equals, value = word.partition("=")
        if name.startswith("--data.") and name != "--data.class_path":
            value = value if equals else " ".join(layers.words[i + 1 : i + 2])
            found[name.removeprefix("--data.").removeprefix("init_args.")] = yaml.safe_load(value)
    return found
