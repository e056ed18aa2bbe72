"""Run configurations of earlier versions in today's terms: classes have moved, and options have other names."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...backbones.config import rwkv7_of_v01
from ...errors import ConfigError
from ...utils.renamed import new_names

# A module that configurations of 0.1 name in a `class_path` -> the module that has its classes now.
MODULES = {
    "omnimix.modalities.fronts": "omnimix.modalities.audio.fronts",
    "omnimix.modalities.mel": "omnimix.modalities.audio.mel",
    "omnimix.recipes.audio_data": "omnimix.recipes.audio.data",
    "omnimix.recipes.data": "omnimix.recipes.vision.data",
    "omnimix.recipes.folders": "omnimix.recipes.vision.folders",
    "omnimix.recipes.moving_digits": "omnimix.recipes.video.moving_digits",
    "omnimix.recipes.strategies": "omnimix.recipes.common.strategies",
    "omnimix.recipes.text_data": "omnimix.recipes.text.data",
    "omnimix.recipes.training": "omnimix.recipes.common.training",
    "omnimix.recipes.video_data": "omnimix.recipes.video.data",
    "omnimix.recipes.video_preprocess": "omnimix.recipes.video.preprocess",
}

# What options of objectives were called before.
RENAMED = {"ahead": "n_future", "ahead_weight": "n_future_weight"}
# And arguments of recipes' modules.
RENAMED_ARGUMENTS = {"tie": "tie_word_embeddings", "vocabulary": "vocab_size"}


def current_path(class_path: str) -> str:
    """Where a class is now."""
    module, dot, name = class_path.rpartition(".")
    return f"{MODULES.get(module, module)}{dot}{name}"


def migrate(content: Any) -> Any:
    """The plain values of a configuration in today's terms.

    Raises:
        ConfigError: an option that has another name now has a value that it never had.
    """
    content = _with_paths(content)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        try:
            content["model"] = _model(content["model"])
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise ConfigError(f"model holds options of version 0.1 with values that they never had: {error}") from error
    return content


def _model(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe's model; version 0.1 called the feed-forward layer `channel`."""
    values = new_names(values, RENAMED_ARGUMENTS)
    if "spectrogram" in values:
        values = _with_front(values)
    if "objectives" in values:
        values = dict(values)
        chosen = (values.pop("objectives") or {}).get(kind := values.get("objective", "causal")) or {}
        values["objective"] = {"type": kind, **chosen.get("init_args", chosen)}
    if isinstance(values.get("objective"), dict):
        values = {**values, "objective": _objective(values["objective"])}
    if not {"channel", "channels"} & values.keys():
        return values
    values = dict(values)
    kind, options = values.pop("channel", "swiglu"), values.pop("channels", None) or {}
    if kind is None:
        values["ffn"] = None
    else:
        chosen = options.get(kind) or {}
        values["ffn"] = {"type": kind, **chosen.get("init_args", chosen)}
    # What was said of mixers that the pattern does not name had no effect.
    if "mixer" in values:
        named = re.split(r"[,+\s]+", values["mixer"])
        values["mixers"] = {name: v for name, v in (values.get("mixers") or {}).items() if name in named}
        if "rwkv7" in named and "dim" in values:
            own = values["mixers"].get("rwkv7") or {}
            values["mixers"]["rwkv7"] = rwkv7_of_v01(values["dim"], own.get("init_args", own))
    return values


def _objective(values: dict[str, Any]) -> dict[str, Any]:
    """The options of an objective by their new names."""
    if isinstance(values.get("init_args"), dict):
        values = {**values, "init_args": new_names(values["init_args"], RENAMED)}
    return new_names(values, RENAMED)


def _with_front(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a sound model whose front was a name, and what it sees an option of its own."""
    kind = {"type": values["front"]} if "front" in values else {}
    seen = values["spectrogram"] or {}
    values = {name: value for name, value in values.items() if name != "spectrogram"}
    if kind.get("type") == "wave":
        return values | {"front": kind}
    mel = {"bins": seen["bins"]} if "bins" in seen else {}
    if "step" in seen:
        # Milliseconds, in samples at 16 kHz.
        mel["hop"] = max(1, round(16 * seen["step"]))
    masks = ("time_masks", "time_width", "frequency_masks", "frequency_width")
    augment = {name: seen[name] for name in masks if name in seen}
    own = {"mel": mel, "augment": augment, "positions": seen.get("positions")}
    if kind.get("type") == "patches":
        own["patch"] = seen.get("patch")
    return values | {"front": kind | {name: value for name, value in own.items() if value}}


def _with_paths(content: Any) -> Any:
    """The plain values of a configuration, with the class paths of today."""
    if isinstance(content, dict):
        return {
            key: current_path(value) if key == "class_path" and isinstance(value, str) else _with_paths(value)
            for key, value in content.items()
        }
    return [_with_paths(value) for value in content] if isinstance(content, list) else content


@contextlib.contextmanager
def migrated_files(argv: list[str]) -> Iterator[list[str]]:
    """The command line, in which a copy stands for every `--config FILE` that an earlier version has written.

    A file that cannot be read stays: the parser says what is wrong with it.

    Raises:
        ConfigError: a file has options of 0.1 with values that they never had.
    """
    current = list(argv)
    with tempfile.TemporaryDirectory() as folder:
        for i, word in enumerate(argv[:-1]):
            if word != "--config":
                continue
            try:
                content = yaml.safe_load(Path(argv[i + 1]).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            try:
                new = migrate(content)
            except ConfigError as error:
                raise ConfigError(f"{argv[i + 1]}: {error}") from error
            if new != content:
                copy = Path(folder) / f"{i}.yaml"
                copy.write_text(yaml.safe_dump(new, sort_keys=False), encoding="utf-8")
                current[i + 1] = str(copy)
        yield current
