"""Whole jobs in Python: `omnimix.fit` trains as the command line does, and returns the run."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from ..backbones.serialization import to_dict
from ..errors import CheckpointError, ConfigError, UnknownName
from ..modalities.text.text_generator import TextGenerator
from ..utils.cache import cache_folder
from ..utils.files import replace_file
from ..utils.log import printed
from ..utils.run_folder import RunFolder
from .common.help import MEANT
from .common.options import options_argument
from .common.private_lightning import LOGGERS
from .common.training import Interrupted
from .common.trees import SHORT
from .predictor import Predictor, load

# What is trained -> the recipe's module and the base class of its data sets.
TASKS = {
    "vision": ("VisionClassification", "ImageData"),
    "video": ("VideoUnderstanding", "VideoData"),
    "audio": ("AudioClassification", "AudioData"),
    "text": ("TextGeneration", "TextData"),
}
# Options of the run itself.
_OF_THE_RUN = ("threads", "checkpoint_steps", "configuration", "init")


class Run:
    """A finished run: its numbers, its picture, and its model.

    In a notebook it shows its numbers and its report.

    Args:
        source: the folder of the run, or its name under `runs/`.

    Attributes:
        path: its folder.

    Raises:
        CheckpointError: no such run, or it has no model yet.
    """

    def __init__(self, source: str | Path):
        self._folder = RunFolder.finished(str(source))
        self.path = self._folder.path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured at the end of the training, as in `metrics.json`; empty where there is none."""
        try:
            found = json.loads(self._folder.metrics.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(f"{self._folder.metrics} is corrupt: {error}") from error
        return found if isinstance(found, dict) else {}

    @property
    def report(self) -> Path:
        """The picture of curves and of what the model does."""
        return self._folder.report

    @cached_property
    def predictor(self) -> Predictor | TextGenerator:
        """The model with its preprocessing or tokenizer, as `omnimix.load` returns it."""
        return load(self.path)

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Classify one input or many; see `Predictor.predict`.

        Raises:
            ConfigError: the run is one of a language model, which has `generate`.
        """
        if not isinstance(self.predictor, Predictor):
            raise ConfigError(f"{self!r} is a language model, which classifies nothing; use run.predictor.generate")
        return self.predictor.predict(inputs, **options)

    def evaluate(self, split: str = "val") -> dict[str, float]:
        """Measure the model on the data that the run's configuration names.

        Args:
            split: "val", or "test" of classifiers.

        Returns:
            The metrics by name.

        Raises:
            ConfigError: no such split.
        """
        commands = {"val": "validate", "test": "test"}
        task = self._task
        if split not in commands or (split == "test" and task == "text"):
            known = ["val"] if task == "text" else list(commands)
            raise UnknownName("split", split, known)
        with _contained():
            cli = _recipe(task).make_cli(commands[split], ["--run", str(self.path)])
        return {name: float(value) for name, value in (cli.measured[0] if cli.measured else {}).items()}

    @property
    def _task(self) -> str:
        kinds = {"ImageClassifier": "vision", "VideoClassifier": "video", "AudioClassifier": "audio"}
        return kinds.get(type(self.predictor.model).__name__, "text")

    def _repr_png_(self) -> bytes | None:
        return self.report.read_bytes() if self.report.is_file() else None

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.metrics.items()
            if isinstance(value, int | float | str)
        )
        picture = self._repr_png_()
        shown = "" if picture is None else f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        return f"<p><b>{html.escape(str(self.path))}</b></p><table>{rows}</table>{shown}"


def fit(
    task: str,
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    config: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: int | None = None,
    **options: Any,
) -> Run:
    """Train a model from data to a run, exactly as `omnimix TASK fit` does.

    Args:
        task: "vision", "video", "audio" or "text".
        data: a folder or file of one's own; the name of a data set; tensors by name, as `TensorData` takes them; or
            None for the recipe's own. A mapping with `class_path` and `init_args` names a data set and its options.
        name: of the run, a folder under `runs`; by default the task.
        runs: the folder that holds the runs.
        config: a packaged configuration by its name, or a file of one's own.
        overwrite: replace an older run of this name.
        resume: continue the run of this name from its last saved state.
        seed: of weights, order and augmentation.
        options: those of the command line, by their last word where that says enough: `mixer`, `dim`, `depth`,
            `max_epochs`, `batch_size`, `lr`, ...; `model`, `training`, `trainer` and `loading` take whole mappings.

    Returns:
        The run.

    Raises:
        UnknownName: no such task or option, with the nearest.
        ConfigError: values that do not fit, or a run of this name exists.
        Interrupted: it was stopped; `resume=True` continues.

    Example:
        >>> run = omnimix.fit("vision", data="photos/", mixer="gla", max_epochs=20)
        >>> run.predict("cat.jpg")[0].label
    """
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    argv: list[str] = []
    if config is not None:
        argv += ["--config", str(config)]
    name = task if name is None else name
    argv += ["--name", name, "--runs", str(runs)]
    argv += [flag for flag, wanted in (("--overwrite", overwrite), ("--resume", resume)) if wanted]
    if seed is not None:
        argv.append(f"--seed_everything={seed}")
    argv += _data_words(data)
    objects = {name: options.pop(name) for name in ("callbacks", "logger") if _is_object(options.get(name))}
    if isinstance(objects.get("callbacks"), Callback):
        objects["callbacks"] = [objects["callbacks"]]
    argv += _words(task, options)
    try:
        with _contained(), printed():
            code = _recipe(task).fit(argv, objects)
    except SystemExit as stop:
        # So Ctrl-C before the first step ends a command.
        raise KeyboardInterrupt from stop
    if code:
        raise Interrupted(f"stopped; continue with omnimix.fit({task!r}, ..., name={name!r}, resume=True)")
    return Run(Path(runs) / name)


def _recipe(task: str) -> Any:
    return import_module(f"{__package__}.{task}.recipe")


def _data_words(data: Any) -> list[str]:
    """What is typed for the data."""
    if data is None:
        return []
    if isinstance(data, str | Path):
        return ["--data", str(data)]
    if isinstance(data, Mapping) and data and all(isinstance(value, Tensor) for value in data.values()):
        return ["--data", "TensorData", f"--data.path={_stored(dict(data))}"]
    if isinstance(data, Mapping) and "class_path" in data:
        return ["--data", json.dumps(_plain(data))]
    raise ConfigError(
        f"data is a {type(data).__name__}; it must be a path, the name of a data set, tensors by name, or a mapping "
        "with class_path and init_args. A LightningDataModule of your own goes to lightning's Trainer, with the "
        "recipe's module"
    )


def _stored(tensors: dict[str, Tensor]) -> Path:
    """A file with these tensors in the user's cache, so that the run can be resumed and evaluated."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(tensors.items())}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    file = cache_folder("tensors") / f"{digest.hexdigest()[:24]}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda part: save_file(tensors, part))
    return file


def _is_object(value: Any) -> bool:
    """Whether an argument of the trainer is, or holds, an object, which no command line can hold."""
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(each, Callback | Logger) for each in values)


def _places(task: str) -> dict[str, str]:
    """Every option by its last word: what it is on the command line. In a clash that of the model counts."""
    recipe = _recipe(task)
    module, base = (getattr(recipe, name) for name in TASKS[task])
    arguments = inspect.signature(module).parameters
    training = type(arguments["training"].default)
    places = {name: f"--trainer.{name}" for name in inspect.signature(Trainer).parameters}
    for cls in _subclasses(base):
        places |= {name: f"--data.{name}" for name in inspect.signature(cls).parameters}
    places |= {field.name: f"--data.{field.name}" for field in fields(base.defaults)}
    places |= {field.name: f"--model.training.{field.name}" for field in fields(training)}
    linked = {name for _, name in recipe.LINKS}
    places |= {name: f"--model.{name}" for name in [*SHORT, *arguments] if name not in linked}
    places |= {name: f"--{name}" for name in _OF_THE_RUN}
    return {name: place for name, place in places.items() if name not in ("seed", "training", options_argument(base))}


def _subclasses(cls: type) -> list[type]:
    return [cls, *(each for child in cls.__subclasses__() for each in _subclasses(child))]


# Groups of options, given as a mapping.
_GROUPS = {"model": "--model", "training": "--model.training", "trainer": "--trainer", "loading": "--data.loading"}


def _words(task: str, options: Mapping[str, Any]) -> list[str]:
    """Options as what is typed.

    Raises:
        UnknownName: no such option.
    """
    places: dict[str, str] = _places(task)
    words: list[str] = []
    for name, value in options.items():
        group = _GROUPS.get(name)
        if group is not None and isinstance(value, Mapping):
            words += [f"{group}.{inner}={_text(given)}" for inner, given in value.items()]
        elif name in places:
            words.append(f"{places[name]}={_text(value)}")
        else:
            meant = MEANT.get(name, "").rpartition(".")[2].lstrip("-")
            if meant in places:
                raise ConfigError(f"unknown option {name!r}; did you mean {meant!r}?")
            raise UnknownName("option", name, [*places, *_GROUPS])
    return words


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _text(value: Any) -> str:
    """A value as the command line takes it.

    Raises:
        ConfigError: it is an object.
    """
    value = _plain(value)
    if isinstance(value, str):
        return value
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=1 << 30).removesuffix("\n").removesuffix("\n...")
    except yaml.YAMLError as error:
        raise ConfigError(f"{value!r} cannot be written into a run's configuration; give plain values") from error


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Within it a job may set threads and variables of the environment, which afterwards are as they were."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    levels = [(logger := logging.getLogger(name), logger.level) for name in LOGGERS]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
