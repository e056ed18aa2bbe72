"""What a user typed after a command, before it is parsed: which configurations, which run, which data."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from ...utils.run_folder import RunFolder
from .. import CONFIGS, RECIPES
from .trees import Trees


def argument(argv: list[str], name: str, default: str) -> str:
    """The value of `--name VALUE` or `--name=VALUE` in a command line."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default


def with_run_config(argv: list[str], folder: RunFolder) -> list[str]:
    """The command line with the configuration that a run was started with in front, so that flags still win.

    Where the run has a tokenizer, that is the one: learnt again, from text that has changed since, it would be another.
    """
    own = ["--config", str(folder.config)] if folder.config.is_file() else []
    return [*own, *([f"--data.tokenizer={folder.path}"] if folder.tokenizer.is_file() else []), *argv]


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
        if option not in {"-c", "--config"}:
            rest.append(word)
            continue
        value = value or next(words, "")
        packaged = CONFIGS / f"{value}.yaml"
        name = Path(value).stem
        if Path(value).exists():
            rest += ["--config", value]
        elif packaged.is_file():
            base = packaged
        else:
            known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
            raise ConfigError(f"no configuration {value!r}: no such file, and the package has {', '.join(known)}")
    return rest, base, name


@contextlib.contextmanager
def prepared(argv: list[str], base: Path, model: type) -> Iterator[tuple[list[str], Path]]:
    """What the parser is given: a command line and a file of defaults, with the trees of both in a file of their own.

    Args:
        argv: the command line, with files that this version reads.
        base: the defaults of the recipe, or of the packaged configuration that is named.
        model: the recipe's module.

    Raises:
        ConfigError: an option of one's own files, and the data set is a generated one; or what is wrong with a tree.
    """
    trees = Trees(model)
    with tempfile.TemporaryDirectory() as folder:

        def copied(content: Any, name: str) -> str:
            file = Path(folder) / name
            file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            return str(file)

        file = Path(copied(trees.take(_defaults(base, argv)), base.name))
        rest: list[str] = []
        flags: list[tuple[str, list[str], str]] = []
        words = iter(argv)
        for word in words:
            option, equals, value = word.partition("=")
            place = trees.place(option.split(".")[1:]) if option.startswith("--model.") else None
            if place is not None:
                if not equals and (value := next(words, None)) is None:
                    raise ConfigError(f"{option} needs a value")
                flags.append((option, place, value))
            elif option == "--config" and isinstance(content := _read(value or next(words, "")), dict):
                rest += ["--config", copied(trees.take(content), f"{len(rest)}.yaml")]
            else:
                rest.append(word)
        # A part is named before its options are set, in whatever order they were typed; and flags win over files.
        for flag in sorted(flags, key=lambda flag: len(flag[1])):
            trees.flag(*flag)
        yield [*rest, "--config", copied({"model": trees.checked()}, "trees.yaml")], file


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
    own = _class_name(content["data"])
    named = _data_classes(argv)
    if not named:
        _check_root(argv, base, own)
    if any(name != own for name in named):
        del content["data"]
    return content


def _data_classes(argv: list[str]) -> list[str]:
    """The names of the data sets' classes in a command line and the files that it names."""
    named = [argument(argv, name, "") for name in ("--data", "--data.class_path")]
    for i, word in enumerate(argv[:-1]):
        if word == "--config":
            content = _read(argv[i + 1])
            if isinstance(content, dict):
                named.append(content.get("data") or "")
    return [_class_name(value) for value in named if value]


def _class_name(data: Any) -> str:
    """Of a class path, or of one with its arguments, as YAML holds them and a command line writes them."""
    if isinstance(data, str) and data.lstrip().startswith("{"):
        data = yaml.safe_load(data)
    path = data.get("class_path", "") if isinstance(data, dict) else str(data)
    return path.rpartition(".")[2]


def _check_root(argv: list[str], base: Path, own: str) -> None:
    for name, command in RECIPES.items():
        found = re.search(r"(--data\.\w+) \w+$", command)
        if found is None or command.split(" --")[0] != RECIPES[base.stem].split(" --")[0] or name == base.stem:
            continue
        if argument(argv, found[1], ""):
            raise ConfigError(f"{found[1]} is for your own files, and {own} makes its own: add --config {name}")
