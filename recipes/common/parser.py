"""The parser of the recipes' command lines: Lightning's, whose complaints are one line."""

from __future__ import annotations

import difflib
import re
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from ...errors import ConfigError, OmnimixError, UnknownName
from .help import MEANT
from .options import RecipeData
from .private_jsonargparse import actions
from .trees import SHORT, short_forms, tree_defaults


class Parser(LightningArgumentParser):
    """Lightning's parser, whose complaints are exceptions with the nearest option.

    What recipes take as trees (see trees.py) it holds as plain values.
    """

    # Short forms of the options that the data set shares with others, where this is the parser of one.
    short: frozenset[str] = frozenset()

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **options: Any) -> list[str]:
        """Those of a class, its trees as plain values."""
        trees = tree_defaults(theclass) if issubclass(theclass, pl.LightningModule) else {}
        options |= {"skip": {*trees}} if trees else {}
        added = super().add_class_arguments(theclass, nested_key, **options)
        for name, value in trees.items():
            text = (
                "a tree; see below" if name == "backbone" else f"by name; --model.{name}.OPTION sets one of its options"
            )
            self.add_argument(f"--{nested_key}.{name}", type=Any, default=value, help=text)
        if issubclass(theclass, RecipeData):
            self.short = frozenset(short_forms(theclass))
            prefix = "" if nested_key is None else f"{nested_key}."
            for option, (name, field) in short_forms(theclass).items():
                self.set_defaults({f"{prefix}{name}.{field}": getattr(theclass.defaults, option)})
        return added

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise ConfigError(self._with_hint(_plain(" ".join(str(message).split())))) from ex

    def _with_hint(self, message: str) -> str:
        unknown = re.search(r"Expected a dot import path string: (\w+)", message)
        if unknown is not None:
            return str(UnknownName("class", unknown[1], [c.__name__ for c in subclasses(pl.LightningDataModule)]))
        unknown = re.search(r"Option '(\w+)' is not accepted", message)
        if unknown is not None:
            own = {option.lstrip("-") for action in actions(self) for option in action.option_strings}
            own = {option for option in own if option.rpartition(".")[2] not in self.short} | self.short - {"seed"}
            own -= {"h", "help"}
            within = sorted(name for name in own if name.endswith(f".{unknown[1]}"))
            if within:
                return f"unknown option {unknown[1]!r}; did you mean {within[0]!r}?"
            return str(UnknownName("option", unknown[1], own))
        unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: --?([^\s=]+)", message)
        if unknown is None:
            return message
        word = next(group for group in unknown.groups() if group)
        word = word.removeprefix("fit.").removeprefix("validate.").removeprefix("test.")
        options = {o.lstrip("-") for action in actions(self) for o in action.option_strings}
        options |= {f"model.{name}" for name in SHORT}
        if (meant := MEANT.get(word.rpartition(".")[2])) is not None and meant != f"--{word}":
            return f"{message}; did you mean '{meant}'?"
        near = difflib.get_close_matches(word, options, n=1)
        return f"{message}; did you mean '--{near[0]}'?" if near else message


_TYPES = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text"}


def _plain(message: str) -> str:
    """A complaint of jsonargparse about the option that is meant, without the types that it tried in vain."""
    tried = re.search(r"Does not validate against any of the Union subtypes .*? Errors: - (.*?) - Expected", message)
    message = message if tried is None else message[: tried.start()] + tried[1]
    rest = re.sub(r'^(Parser key "[^"]+": )+', "", message)
    keys = message.removesuffix(rest)
    option = "--" + ".".join(re.findall(r'"([^"]+)"', keys))
    required = re.fullmatch(r"the following arguments are required: ([\w.]+)", rest)
    if keys and required is not None:
        return f"{option}.{required[1]} is required"
    wrong = re.fullmatch(r"Expected an? <class '(\w+)'>\. Got value: (.*)", rest)
    if keys and wrong is not None:
        return f"{option} is {wrong[2]!r}; it must be {_TYPES.get(wrong[1], f'a {wrong[1]}')}"
    # What a class says of its own option comes with that option's name already.
    return re.sub(r"^(--[\w.]+): --([\w.]+: )", r"\1.\2", f"{option}: {rest}") if keys else rest


def subclasses(cls: type) -> set[type]:
    """The classes of omnimix that derive from `cls`."""
    found = {child for direct in cls.__subclasses__() for child in (direct, *subclasses(direct))}
    return {child for child in found if child.__module__.split(".")[0] == __name__.split(".")[0]}


def own_error(error: BaseException | None) -> OmnimixError | None:
    """The error of ours that a parser has wrapped into its own, if there is one."""
    while error is not None and not isinstance(error, OmnimixError):
        error = error.__cause__ or error.__context__
    return error


def of_a_package(message: str) -> str:
    """A complaint of jsonargparse, or where a class lacks a package, such as a logger, what to install."""
    found = re.search(r"class_path '[\w.]*?(\w+)': Requirement '([^']+)' not met", message)
    return message if found is None else f"{found[1]} needs a package that is missing: pip install '{found[2]}'"
