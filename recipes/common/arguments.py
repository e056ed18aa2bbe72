"""What a user typed after a command, before it is parsed: which configurations, which run, which data."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from .. import CONFIGS
from .options import RecipeData
from .rules import Layers, Plan, Rule, fill, left_open
from .trees import DataTrees, Trees

CONFIG_OPTIONS = ("-c", "--config")


def argument(argv: list[str], name: str, default: str) -> str:
    """The value of an option such as `--name` in a command line and the files in it, of which the last one counts."""
    found = default
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        value = value if equals else " ".join(argv[i + 1 : i + 2])
        if option == name:
            found = value or found
        elif option in CONFIG_OPTIONS and isinstance(content := _read(value), dict):
            found = str(content.get(name.removeprefix("--")) or found)
    return found


def configurations(argv: list[str], recipe: str) -> tuple[list[str], Path, str]:
    """Which configurations a command line names.

    Args:
        argv: what the user typed after the command.
        recipe: the packaged configuration of the command.

    Returns:
        The command line without packaged ones, which stand for themselves; the last of them, or else the recipe's,
        which holds the defaults; and the name of the last configuration of all.

    Raises:
        ConfigError: a configuration that there is not.
    """
    rest: list[str] = []
    base, name = CONFIGS / f"{recipe}.yaml", recipe
    words = iter(argv)
    for word in words:
        option, _, value = word.partition("=")
        if option not in CONFIG_OPTIONS:
            rest.append(word)
            continue
        value = value or next(words, "")
        packaged = CONFIGS / f"{value}.yaml"
        name = Path(value).stem
        if Path(value).exists() and not Path(value).is_dir():
            rest += ["--config", value]
        elif packaged.is_file():
            base = packaged
        else:
            known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
            raise ConfigError(f"no configuration {value!r}: no such file, and the package has {', '.join(known)}")
    return rest, base, name


def prepared(
    argv: list[str], base: Path, model: type, data: type[RecipeData], rule: Rule | None = None
) -> tuple[list[str], dict[str, Any], Plan]:
    """What the parser is given: a command line and defaults, with the trees of both in a configuration of their own;
    and what the recipe's rule says.

    Configurations stand in the command line as text: while jsonargparse reads a file, it changes the current folder of
    the process, and so that of every thread.

    Args:
        argv: the command line, with files that this version reads.
        base: the defaults of the recipe, or of the packaged configuration that is named.
        model: the recipe's module.
        data: the base class of its data sets.
        rule: of the recipe, for options that are null.

    Raises:
        ConfigError: an option of one's own files, and the data set is a generated one; or what is wrong with a tree.
    """
    defaults = _defaults(base, argv)
    # Where the data set is unknown, the parser says what is wrong with its name.
    chosen = data_class(data, [*_class_paths(defaults.get("data")), *data_paths(argv)][-1]) or data
    both = trees, options = Trees(model), DataTrees(chosen)
    rest_of_defaults = _take(both, defaults)
    free = [] if rule is None else left_open(rule, Layers(rest_of_defaults, []), both)
    rest, flags = _parted(argv, both)
    # A part is named before its options are set, in whatever order they were typed; and flags win over files.
    for owner, option, place, value in sorted(flags, key=lambda flag: len(flag[2])):
        owner.flag(option, place, value)
    plan = Plan() if rule is None else fill(rule, chosen, free, Layers(rest_of_defaults, rest), both)
    ours = ["--config", _inline({"model": trees.checked()})]
    ours += [f"--data.{name}={json.dumps(value)}" for name, value in options.checked().items()]
    # Help is printed as soon as it is read, without the words that follow it.
    helps = [i for i, word in enumerate(rest) if word.partition("=")[0] in ("--help", "-h", "--data.help")]
    end = helps[0] if helps else len(rest)
    return [*rest[:end], *ours, *rest[end:]], rest_of_defaults, plan


def _inline(content: Any) -> str:
    """A configuration as the text that the parser takes in place of a file."""
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=True, width=1 << 30)


def _parted(argv: list[str], both: tuple[Trees, ...]) -> tuple[list[str], list[tuple[Trees, str, list[str], str]]]:
    """A command line without what belongs to trees, and the flags among that: (tree, flag, place, value) each.

    What the files in it say of the trees is merged; the text of the rest stands for them.
    """
    rest: list[str] = []
    flags: list[tuple[Trees, str, list[str], str]] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        option = both[0].current(option)
        found = next(((each, at) for each in both if (at := each.path(option))), None)
        if found is None and option not in ("--config", "--data"):
            rest.append(option + equals + value)
            continue
        if not equals and (value := next(words, None)) is None:
            raise ConfigError(f"{option} needs a value")
        if found is not None:
            flags.append((found[0], option, found[1], value))
            continue
        content = _read(value) if option == "--config" else {"data": _mapping(value)}
        if isinstance(content, dict) and option == "--config":
            value = _inline(_take(both, content))
        elif isinstance(content, dict) and isinstance(content["data"], dict):
            value = json.dumps(_take(both, content)["data"])
        rest += [option, value]
    return rest, flags


def _take(both: tuple[Trees, ...], content: Any) -> Any:
    """Merge what a file says of all trees, and return the rest of it."""
    for trees in both:
        content = trees.take(content)
    return content


def _read(file: str) -> Any:
    """The content of a YAML file; None where it cannot be read: the parser says what is wrong with it."""
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _defaults(base: Path, argv: list[str]) -> dict[str, Any]:
    """The defaults in `base`, without its data set where the user names another.

    jsonargparse would hand on to a class whatever values of another one it can take, its defaults too.
    """
    content = yaml.safe_load(base.read_text(encoding="utf-8"))
    own = _name(_class_paths(content["data"])[0])
    named = [_name(path) for path in data_paths(argv)]
    if any(name != own for name in named):
        del content["data"]
        # They are beginnings of its texts.
        content["model"].pop("prompts", None)
    return content


def data_paths(argv: list[str]) -> list[str]:
    """The data sets that a command line names, and those that the files in it name, in their order."""
    found: list[str] = []
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        value = value if equals else " ".join(argv[i + 1 : i + 2])
        if option in ("--data", "--data.class_path"):
            found += _class_paths(_mapping(value))
        elif option == "--config" and isinstance(content := _read(value), dict):
            found += _class_paths(content.get("data"))
    return found


def _class_paths(data: Any) -> list[str]:
    """The class path in what YAML or a command line says of the data, if there is one."""
    path = data.get("class_path") if isinstance(data, dict) else data
    return [path] if isinstance(path, str) and path else []


def _mapping(value: str) -> Any:
    """A class path as it is; one with its arguments, as a command line writes them, as a mapping."""
    if not value.lstrip().startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def data_class(base: type[RecipeData], path: str) -> type[RecipeData] | None:
    """The data set that a name or a class path stands for; None where there is none."""
    known = [base]
    for cls in known:
        known += cls.__subclasses__()
    found = [cls for cls in known if path in (cls.__name__, f"{cls.__module__}.{cls.__name__}")]
    if found or "." not in path:
        return found[0] if found else None
    try:
        cls = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return cls if isinstance(cls, type) and issubclass(cls, base) else None
