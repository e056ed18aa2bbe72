"""`--init`: a fit that begins with the weights of another model, and with nothing else of it."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...modalities import read_details
from ...modalities.common.grid import fit_positions
from ...modalities.common.weights import CONFIG, WEIGHTS, check_finite, plain_names, stored_as
from ...utils.console import say
from ...utils.log import logger_of
from ...utils.run_folder import RunFolder
from .options import RecipeData

logger = logger_of(__name__)
# The least fraction of a model's tensors, other than its head's, that must be found.
ENOUGH = 0.5
_HEADS = ("head.classifier.",)


@dataclass
class Loaded:
    """What became of the tensors of a model.

    Args:
        source: where the weights are from.
        whole: names of those that were loaded as they were.
        changed: name -> how a tensor was made to fit.
        left: name -> why a tensor of the model keeps its new values.
        unused: names that only the source has.
    """

    source: str
    whole: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.whole) + len(self.changed) + len(self.left)
        parts = [f"{len(self.whole) + len(self.changed)} of {total} tensors loaded"]
        parts += [f"{name} {how}" for name, how in self.changed.items()]
        parts += [f"{name} is new ({why})" for name, why in list(self.left.items())[:4]]
        parts += [f"and {len(self.left) - 4} more are new"] if len(self.left) > 4 else []
        parts += [f"{len(self.unused)} of the source not used"] if self.unused else []
        return f"{self.source}: {', '.join(parts)}"


def source_of(init: str) -> Path:
    """The folder or file that `--init` names: a run by its name or folder, a folder of a saved model, or a file.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(init).expanduser()
    if init.startswith("timm:"):
        raise ConfigError(
            f"init is {init!r}; timm's weights have other names than omnimix's models. Name a run, a folder of a saved "
            "model, or a file of weights"
        )
    if path.is_file() or (path / WEIGHTS).is_file():
        return path
    return RunFolder.finished(init).path


@contextlib.contextmanager
def with_model_of(argv: list[str], init: str, model: dict[str, Any] | None, tokenizer: bool) -> Iterator[list[str]]:
    """The command line with the model of a run in front, so that the weights fit; flags still win.

    Args:
        init: what `--init` names.
        model: the options of the run's model, without those of its training; None where it is another source.
        tokenizer: whether the data set trains a tokenizer, for which the run's own is taken.
    """
    source = source_of(init)
    words = list(argv)
    if tokenizer and source.is_dir() and (source / "tokenizer.json").is_file():
        words = [f"--data.tokenizer={source}", *words]
    if model is None:
        yield words
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "config.yaml"
        copy.write_text(yaml.safe_dump({"model": model}, sort_keys=False), encoding="utf-8")
        yield ["--config", str(copy), *words]


def read_weights(source: Path) -> dict[str, Tensor]:
    """The weights in a folder or file, read without executing anything.

    Raises:
        CheckpointError: it cannot be read, or holds no weights.
    """
    file = source / WEIGHTS if source.is_dir() else source
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            weights: Any = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model"):
                weights = weights[key] if isinstance(weights, dict) and isinstance(weights.get(key), dict) else weights
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"init: cannot read {str(file)!r}: {said}") from error
    items = weights.items() if isinstance(weights, dict) else ()
    found = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not found:
        raise CheckpointError(f"init: {str(file)!r} holds no weights by their names")
    found = plain_names(found)
    if all(name.startswith("model.") for name in found):
        found = {name.removeprefix("model."): value for name, value in found.items()}
    check_finite(found, file)
    return found


@torch.no_grad()
def initialise(module: Any, data: RecipeData, init: str) -> Loaded:
    """Load what fits of another model's weights into a recipe's module.

    Position tables are resized, patch projections of another number of channels are summed or repeated, and rows of the
    head go to the classes of the same names. The statistics by which inputs are normalised are taken over.

    Raises:
        CheckpointError: unreadable weights, or less than half of the model's tensors are among them.
    """
    source = source_of(init)
    model = module.model
    weights = stored_as(read_weights(source), model)
    fitted = fit_positions(weights, model)
    own = plain_names(model.state_dict())
    loaded = Loaded(str(init), unused=sorted(weights.keys() - own.keys()))
    before, after = _classes(source), tuple(getattr(getattr(data, "preprocess", None), "classes", ()))
    values: dict[str, Tensor] = {}
    for name, tensor in own.items():
        given = fitted.get(name)
        if given is None:
            loaded.left[name] = "not in the source"
        elif name.startswith(_HEADS):
            values[name] = _head(loaded, name, tensor, given, before, after)
        elif given.shape != tensor.shape and (adapted := _channels(tensor, given)) is not None:
            values[name] = adapted
            loaded.changed[name] = f"from {given.shape[1]} channels"
        elif given.shape != tensor.shape or given.is_floating_point() != tensor.is_floating_point():
            loaded.left[name] = f"{tuple(given.shape)} there, {tuple(tensor.shape)} here"
        else:
            values[name] = given
            if given.shape == weights[name].shape:
                loaded.whole.append(name)
            else:
                loaded.changed[name] = f"resized from {tuple(weights[name].shape)}"
    body = [name for name in own if not name.startswith(_HEADS)]
    if sum(name not in loaded.left for name in body) < ENOUGH * len(body):
        shown = "; ".join(f"{name}: {why}" for name, why in list(loaded.left.items())[:4])
        raise CheckpointError(
            f"init: less than half of the model's tensors are in {str(source)!r} ({shown}); give the model the same "
            "mixer, width and depth, or leave --init out"
        )
    for name, value in values.items():
        own[name].copy_(value)
    if adopt_statistics(source, data):
        say("init: inputs are normalised as they were there")
    say(f"init: {loaded}")
    for name, why in loaded.left.items():
        logger.debug("init: %s is new: %s", name, why)
    return loaded


def _head(
    loaded: Loaded, name: str, tensor: Tensor, given: Tensor, before: Sequence[str], after: Sequence[str]
) -> Tensor:
    """A tensor of the head, with the rows of the classes that both have, by their names."""
    if given.shape[1:] != tensor.shape[1:]:
        loaded.left[name] = f"{tuple(given.shape)} there, {tuple(tensor.shape)} here"
        return tensor
    if len(before) != len(given):
        loaded.left[name] = "its classes have no names there"
        return tensor
    pairs = [(i, before.index(label)) for i, label in enumerate(after) if label in before]
    if not pairs:
        loaded.left[name] = "other classes"
        return tensor
    found = tensor.clone()
    for own, other in pairs:
        found[own] = given[other].to(found)
    loaded.changed[name] = f"has {len(pairs)} of {len(after)} classes from there"
    return found


def _channels(tensor: Tensor, given: Tensor) -> Tensor | None:
    """A patch projection of 3 channels for 1, or the other way round; None where that is not the difference."""
    if given.ndim != tensor.ndim or given.ndim < 4 or given.shape[2:] != tensor.shape[2:]:
        return None
    if given.shape[0] != tensor.shape[0] or {given.shape[1], tensor.shape[1]} != {1, 3}:
        return None
    return given.sum(1, keepdim=True) if tensor.shape[1] == 1 else given.expand_as(tensor) / 3


def _classes(source: Path) -> tuple[str, ...]:
    """The names of the classes of a saved model; none where it does not say them."""
    values = _preprocess(source).get("classes")
    return tuple(map(str, values)) if isinstance(values, list) else ()


def _preprocess(source: Path) -> dict[str, Any]:
    folder = source if source.is_dir() else source.parent
    if not (folder / CONFIG).is_file() or (source.is_file() and source.name != WEIGHTS):
        return {}
    found = read_details(folder).get("preprocess")
    return found if isinstance(found, dict) else {}


def adopt_statistics(source: Path, data: Any) -> bool:
    """Let a data set normalise its inputs as the weights in a folder or file are used to; whether that is a change."""
    told = _preprocess(source)
    own: Any = getattr(data, "preprocess", None)
    values = {name: tuple(map(float, told[name])) for name in ("mean", "std") if isinstance(told.get(name), list)}
    if len(values) < 2 or not hasattr(own, "mean") or any(len(v) != len(own.mean) for v in values.values()):
        return False
    changed = any(getattr(own, name) != value for name, value in values.items())
    if changed:
        data.preprocess = replace(own, **values)
    return changed
