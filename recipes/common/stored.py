"""What is taken from the config.yaml of a run, which may be a stranger's: plain values by name, and nothing that runs.

Everything is checked by its name before anything is imported. What could run code or write files (callbacks, loggers,
profilers, plugins, strategies of one's own) comes from the command line alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import pickle
import tempfile
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ...backbones.serialization import current_name
from ...errors import CheckpointError, ConfigError
from ...modalities.common.weights import check_fits, stored_shapes
from ...utils.console import say
from ...utils.options import cores
from ...utils.run_folder import RunFolder
from .arguments import argument, data_class, data_paths
from .migration import migrate
from .options import RecipeData
from .parser import subclasses
from .trees import SHORT, TREES, renamed_of, short_forms

OTHER_MODEL = "it is of another model; leave out options that change the model, or start anew with --overwrite"
DAMAGED = "it is damaged; start anew with --overwrite"
# Bytes, values and depth of a file; ours have some 4 kB.
_LARGEST, _VALUES, _DEPTH = 1 << 20, 100_000, 40
# Fields next to `trainer`, `model` and `data`; the folder itself says what `name` and `runs` are.
_PLAIN = ("seed_everything", "checkpoint_steps", "configuration", "threads", "init")
# Options of the trainer that say what is computed, as plain values.
_TRAINER = frozenset(
    """
    precision fast_dev_run max_epochs min_epochs max_steps min_steps max_time limit_train_batches limit_val_batches
    limit_test_batches overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps
    enable_checkpointing enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val
    gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler detect_anomaly barebones
    sync_batchnorm reload_dataloaders_every_n_epochs
    """.split()
)
# Options that are one of a few words.
_WORDS = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "ddp_spawn", "fsdp2"),
    # A logger that is named would write to wherever it says.
    "logger": (False,),
}
# What a trainer does without being told; nothing is said where these are left out.
_IDLE = {"num_nodes": 1, "enable_autolog_hparams": True}


@contextlib.contextmanager
def stored_config(argv: list[str], folder: RunFolder, data: type[RecipeData], *, fit: bool) -> Iterator[list[str]]:
    """The command line with what a run was started with in front, so that flags still win.

    Where the run has a tokenizer, it is used: one trained again, on text that has changed since, would differ.

    Args:
        argv: what the user typed after the command.
        folder: of the run.
        data: the base class of the recipe's data sets.
        fit: whether the run is resumed; otherwise it is evaluated, in one process.

    Raises:
        CheckpointError: the file cannot be read, or names what is not taken from a run.
    """
    if not folder.config.is_file():
        yield argv
        return
    content = _Run(folder, data, argv, fit=fit).content()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "config.yaml"
        copy.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        tokenizer = [f"--data.tokenizer={json.dumps(str(folder.path))}"] if folder.tokenizer.is_file() else []
        yield ["--config", str(copy), *tokenizer, *argv]


def run_of(command: str, argv: list[str], task: str) -> RunFolder | None:
    """The run whose configuration a command begins with: the one to resume, or to evaluate."""
    if command != "fit":
        run = argument(argv, "--run", "")
        return RunFolder.finished(run) if run else None
    if "--resume" not in argv:
        return None
    folder = RunFolder.named(argument(argv, "--runs", "runs"), argument(argv, "--name", task))
    if folder.recover():
        say(f"what was to replace the run {str(folder.path)!r} was stopped before its first step: the run is as it was")
    return folder


class _Run:
    """The configuration of one run while it is checked."""

    def __init__(self, folder: RunFolder, data: type[RecipeData], argv: list[str], *, fit: bool):
        self.folder, self.data, self.argv, self.fit = folder, data, argv, fit
        self.file = folder.config

    def content(self) -> dict[str, Any]:
        """What the file says, in today's terms, as far as it is taken."""
        try:
            content = migrate(self._read())
        except ConfigError as error:
            raise CheckpointError(f"cannot read {str(self.file)!r}: {error}") from error
        for key in content:
            if key not in (*_PLAIN, "name", "runs", "trainer", "model", "data"):
                raise self._refused(key, "which no run has")
        kept = {key: content[key] for key in _PLAIN if key in content and (self.fit or key != "init")}
        for key, value in kept.items():
            self._scalar(key, value)
        kept |= {"name": self.folder.path.name, "runs": str(self.folder.path.parent)}
        if content.get("trainer") is not None:
            kept["trainer"] = self._trainer(self._mapping("trainer", content["trainer"]))
        if content.get("model") is not None:
            kept["model"] = self._model(self._mapping("model", content["model"]))
        if content.get("data") is not None and (chosen := self._data(content["data"])) is not None:
            kept["data"] = chosen
        return kept

    def _read(self) -> dict[str, Any]:
        try:
            with self.file.open("rb") as opened:
                raw = opened.read(_LARGEST + 1)
            if len(raw) > _LARGEST:
                raise ValueError(f"it has more than {_LARGEST:,} bytes")
            content = yaml.safe_load(raw.decode("utf-8"))
        except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
            raise CheckpointError(f"cannot read {str(self.file)!r}: {' '.join(str(error).split())}") from error
        except RecursionError as error:
            raise CheckpointError(f"cannot read {str(self.file)!r}: it is nested too deeply") from error
        self._left = _VALUES
        self._plain("", content, 0)
        return self._mapping("the whole", content)

    def _plain(self, place: str, value: Any, depth: int) -> None:
        """Refuse what is no mapping, list or scalar, and more than any run holds: aliases repeat whole trees."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise CheckpointError(
                f"cannot read {str(self.file)!r}: it holds more than any run, at {place or 'the top'}"
            )
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise self._refused(f"{place}.{key}".strip("."), "which is no name")
                self._plain(f"{place}.{key}".strip("."), inner, depth + 1)
        elif isinstance(value, list):
            for inner in value:
                self._plain(place, inner, depth + 1)
        else:
            self._scalar(place, value)

    def _scalar(self, place: str, value: Any) -> None:
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise CheckpointError(f"{str(self.file)!r}: {place} is {value!r}; it must be one plain value")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{str(self.file)!r}: {place} is {value}; it must be finite")
        if isinstance(value, int) and value.bit_length() > 64:
            raise CheckpointError(f"{str(self.file)!r}: {place} is a number of more than 64 bits")

    def _mapping(self, place: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise CheckpointError(f"{str(self.file)!r}: {place} is {value!r}; it must be a mapping")
        return value

    def _refused(self, place: str, why: str) -> CheckpointError:
        return CheckpointError(f"{str(self.file)!r} says {place!r}, {why}; nothing of it was imported")

    def _trainer(self, values: dict[str, Any]) -> dict[str, Any]:
        kept, left = {}, []
        for name, value in values.items():
            if name in _WORDS:
                taken = value in _WORDS[name]
            elif name == "devices":
                taken = self._devices(value)
            else:
                taken = name in _TRAINER and not _holds_class(value)
            if taken:
                kept[name] = value
            elif value not in (None, False, _IDLE.get(name)):
                left.append(f"trainer.{name}")
        if not self.fit:
            # One process evaluates, unless the command line says otherwise.
            for name in ("devices", "strategy"):
                kept.pop(name, None)
        if left:
            names = ", ".join(left)
            say(f"{names} of {self.file} are not used: a run does not say what else runs; add --{left[0]}", error=True)
        return kept

    def _devices(self, value: Any) -> bool:
        """Whether a number of devices is plain, and this machine has so many."""
        text = str(value)
        # Nobody has as many as 18 digits can say; Python reads no more than some thousands of them.
        count = len(value) if isinstance(value, list) else int(text[:18]) if text.isdecimal() else 1
        here = max(cores(), torch.cuda.device_count())
        if self.fit and count > here:
            raise CheckpointError(
                f"{str(self.file)!r}: trainer.devices is {value!r}, and this machine has {here}; add --trainer.devices"
            )
        return not isinstance(value, dict)

    def _model(self, values: dict[str, Any]) -> dict[str, Any]:
        # Trees name their parts, which are looked up in our registries and never imported.
        for name, value in values.items():
            if name not in TREES and name not in SHORT and _holds_class(value):
                raise self._refused(f"model.{name}.class_path", "and a model's options are plain values")
            if name == "training" and value is not None:
                self._mapping(f"model.{name}", value)
        return values

    def _data(self, values: Any) -> dict[str, Any] | None:
        """The data set and its options; None where the command line names another."""
        values = {"class_path": values} if isinstance(values, str) else self._mapping("data", values)
        for key in values.keys() - {"class_path", "init_args"}:
            raise self._refused(f"data.{key}", "and a data set is a class_path with its init_args")
        path, named = values.get("class_path"), data_paths(self.argv)
        if not isinstance(path, str):
            raise self._refused(f"data.class_path: {path!r}", "which is no name of a data set")
        ours = {name: cls for cls in subclasses(self.data) for name in (cls.__name__, _full_name(cls))}
        if path in ours:
            chosen = ours[path]
        elif path in named:
            chosen = data_class(self.data, path)
        elif named:
            return None
        else:
            raise CheckpointError(
                f"{str(self.file)!r}: data.class_path is {path!r}, which is none of omnimix's; what a run names "
                f"is not imported: if you trust it, name it yourself, --data {path}"
            )
        given = values.get("init_args") or {}
        if chosen is None:  # the parser says what is wrong with what was typed
            return None
        return {"class_path": path, "init_args": self._options(chosen, self._mapping("data.init_args", given))}

    def _options(self, chosen: type[RecipeData], values: dict[str, Any]) -> dict[str, Any]:
        hints, short = _hints(chosen), {*short_forms(chosen), *renamed_of(chosen)}
        kept = {}
        for name, value in values.items():
            place = f"data.{name}"
            if name not in hints and name not in short:
                raise CheckpointError(f"{str(self.file)!r}: {chosen.__name__} has no option {name!r}")
            if value is not None and name in hints:
                if _imports(hints[name]):
                    raise self._refused(place, f"which may name a class: give it on the command line, --{place}")
                if _dataclasses_in(hints[name]):
                    value = self._mapping(place, value)
            if _holds_class(value):
                raise self._refused(f"{place}.class_path", "and options of data sets are plain values")
            kept[name] = (
                {key: self._of_this_machine(key, each) for key, each in value.items()}
                if isinstance(value, dict)
                else self._of_this_machine(name, value)
            )
        return kept

    def _of_this_machine(self, name: str, value: Any) -> Any:
        """A number of processes as far as there are cores for them, and no place outside to write to."""
        if name == "workers" and isinstance(value, int) and value > cores():
            say(f"data.workers is {value} in {self.file}: {cores()} are started, one a core", error=True)
            return cores()
        if name == "cache" and value is not None and not (self.fit and _inside(value)):
            return None
        return value


def _inside(value: Any) -> bool:
    """Whether a place lies in the current folder."""
    return isinstance(value, str) and Path(value).resolve().is_relative_to(Path.cwd())


def _holds_class(value: Any) -> bool:
    """Whether a class is named anywhere in plain values."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_holds_class, value.values()))
    return isinstance(value, list) and any(map(_holds_class, value))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _hints(cls: type) -> dict[str, Any]:
    """The arguments of a class by name, with their types, those included that it hands on to its base."""
    found: dict[str, Any] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each) or not issubclass(each, RecipeData):
            continue
        parameters = inspect.signature(each.__init__).parameters
        hints = typing.get_type_hints(each.__init__)
        more = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        found = {name: hints.get(name, Any) for name in parameters if name not in ("self", *more)} | found
        if not more:
            break
    return found


def _dataclasses_in(hint: Any) -> list[type]:
    hints = (hint, *typing.get_args(hint))
    return [option for option in hints if isinstance(option, type) and dataclasses.is_dataclass(option)]


def _imports(hint: Any) -> bool:
    """Whether the parser would import what text names, for an argument of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal or hint in (Any, Ellipsis, None, type(None), bool, int, float, str, Path):
        return False
    if inner and origin is not type and origin is not typing.get_origin(Callable[[], None]):
        return any(map(_imports, inner))
    if dataclasses.is_dataclass(hint):
        return any(map(_imports, typing.get_type_hints(hint).values()))
    return hint not in (list, dict, tuple, set)


def build_fitting(folder: RunFolder, cls: type[Any], *arguments: Any, fit: bool, **options: Any) -> Any:
    """A recipe's module, once it is sure that the weights of a run are those of such a module.

    The sizes in a configuration may be anything: nothing of such a size is made before. A run that is resumed before
    it has saved a state begins anew.

    Args:
        cls: the recipe's module; the rest are its arguments.
        fit: whether the run is resumed.

    Raises:
        CheckpointError: the weights are of another module.
    """
    make = partial(cls, *arguments, **options)
    if fit and not folder.last.is_file():
        return make()
    file = folder.last if fit else folder.weights
    shapes = _shapes_of_state(file) if fit else stored_shapes(file)
    try:
        check_fits(lambda: make().model, shapes, file, backbone=options["backbone"])
    except CheckpointError as error:
        if not fit:
            raise
        raise CheckpointError(f"cannot resume from {str(file)!r}: {OTHER_MODEL} ({error})") from error
    return make()


def _shapes_of_state(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the model in a saved state of training.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = torch.load(file, mmap=True, map_location="cpu", weights_only=True)["state_dict"]
        return {
            current_name(name.removeprefix("model.")): tuple(tensor.shape)
            for name, tensor in state.items()
            if name.startswith("model.")
        }
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot resume from {str(file)!r}: {DAMAGED}") from error


def why_not_resumed(error: Exception) -> str | None:
    """What is wrong with the saved state, if that is what `error` says."""
    text = str(error)
    if "loading state_dict" in text:
        return OTHER_MODEL
    if isinstance(error, EOFError | pickle.UnpicklingError) or "PytorchStreamReader" in text:
        return DAMAGED
    return None


def stored_model(folder: Path, data: type[RecipeData]) -> dict[str, Any] | None:
    """The options of a run's model, without those of its training; None where a folder is no run.

    Raises:
        CheckpointError: see `stored_config`.
    """
    run = RunFolder(folder)
    if not folder.is_dir() or not run.config.is_file():
        return None
    model = _Run(run, data, [], fit=True).content().get("model") or {}
    return {name: value for name, value in model.items() if name != "training"}
