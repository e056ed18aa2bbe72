"""Models as folders: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones.config import BackboneConfig
from ...backbones.serialization import current_name, from_dict, to_dict
from ...errors import CheckpointError, ConfigError, OmnimixError, UnknownName
from ...utils.files import replace_file, replace_tensors
from ...utils.private_torch import COMPILED, inside_compiled
from .grid import fit_positions

# The format of what `write_config` writes. Version 0.1 wrote none, which is 1.
FORMAT = 2
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Shape = tuple[int, ...]
# The largest config.json; the tables of names in ours have some kB.
_LARGEST = 16 << 20
# Marks that torch.compile and data parallel wrappers leave in parameter names.
_WRAPPERS = (f"{COMPILED}.", "module.")


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in today's names, without the marks that torch.compile and data-parallel wrappers leave in them."""
    plain = {}
    for name, tensor in weights.items():
        plain[current_name(_unmarked(name))] = tensor
    return plain


def _unmarked(name: str) -> str:
    return name.replace(_WRAPPERS[0], "").removeprefix(_WRAPPERS[1])


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data-parallel wrappers."""
    while True:
        inner = inside_compiled(model)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def first_names(model: nn.Module) -> dict[str, str]:
    """Each name in a module's state dict -> the first one of its tensor: blocks that share weights name it again."""
    first: dict[int, str] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in plain_names(tensors).items()}


def stored_as(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights as they were stored, in the names and forms that the model has, each name of a shared one included."""
    for name, module in model.named_modules():
        if upgrade := getattr(module, "upgrade_state", None):
            upgrade(weights, f"{name}." if name else "")
    shared = {name: weights[first] for name, first in first_names(model).items() if first in weights}
    return shared | weights


def save_weights(model: nn.Module, file: str | Path) -> None:
    """Write a module's state dict as safetensors, each tensor once; the file appears whole or not at all."""
    state, first = plain_names(unwrap(model).state_dict()), first_names(unwrap(model))
    weights = {name: t.detach().cpu().contiguous() for name, t in state.items() if first.get(name, name) == name}
    replace_tensors(file, weights, {"format": "pt"})


def stored_shapes(file: str | Path) -> dict[str, Shape]:
    """The shapes of the tensors in a safetensors file, by today's names, from its header alone.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    return {current_name(_unmarked(name)): tuple(found.get_shape()) for name, found in _header(file).items()}


def stored_types(file: str | Path) -> dict[str, str]:
    """What safetensors calls the types of the tensors in a file, by their names there. Errors: see `stored_shapes`."""
    return {name: found.get_dtype() for name, found in _header(file).items()}


def _header(file: str | Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; nothing was loaded") from error


def check_fits(
    make: Callable[[], nn.Module],
    shapes: Mapping[str, Shape],
    file: str | Path,
    *,
    backbone: BackboneConfig | None = None,
) -> None:
    """Raise CheckpointError unless stored weights are those of the model that `make` returns.

    It is made without memory: sizes that a stranger's configuration asks for cost nothing.

    Args:
        make: returns the model; on the device "meta" too.
        shapes: of the stored weights, by name.
        file: that holds them.
        backbone: what the configuration asks for, where the model has one.
    """
    if backbone is not None:
        check_blocks(shapes, backbone, file)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = unwrap(make())
                stored = stored_as({name: torch.empty(shape) for name, shape in shapes.items()}, model)
                own = plain_names(model.state_dict())
        except OmnimixError as error:
            raise CheckpointError(f"{file} does not fit the model: {error}; nothing was loaded") from error
        except (RuntimeError, ValueError, OverflowError, MemoryError, TypeError) as error:
            # Sizes beyond what a tensor can have.
            what = " ".join(str(error).split())
            raise CheckpointError(
                f"{file} does not fit the model, which cannot be built: {what}; nothing was loaded"
            ) from error
    _compare(_shapes(own), _shapes(stored), file)


def check_blocks(names: Iterable[str], backbone: BackboneConfig, file: str | Path, prefix: str = "") -> None:
    """Raise CheckpointError where stored weights are of fewer blocks than a backbone has.

    Args:
        names: of the stored weights.
        prefix: of those of the model.
    """
    pattern = re.compile(re.escape(prefix) + r"backbone\.blocks\.(\d+)\.")
    stored = len({found[1] for name in names if (found := pattern.match(name))})
    # Blocks that share all their weights are stored once.
    if backbone.depth > stored and not any(entry.tie for entry in backbone.layers):
        raise CheckpointError(
            f"{file} does not fit the model: it has {stored} blocks, and the model {backbone.depth}; nothing was loaded"
        )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(t.shape) for name, t in weights.items()}


def _compare(own: Mapping[str, Shape], stored: Mapping[str, Shape], file: str | Path) -> None:
    problems = [f"{name} is missing" for name in own.keys() - stored.keys()]
    problems += [f"{name} is unknown to the model" for name in stored.keys() - own.keys()]
    problems += [
        f"{name} is {stored[name]}, and in the model {own[name]}"
        for name in own.keys() & stored.keys()
        if own[name] != stored[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{file} does not fit the model: {shown}; nothing was loaded")


def load_weights(model: nn.Module, file: str | Path, *, resize: bool = False) -> None:
    """Load a safetensors file into a module, all of it or nothing.

    Args:
        resize: fit position tables that were made for another image size.

    Raises:
        CheckpointError: the file is missing or corrupt, its names or shapes are not the module's, or it holds
            integers in place of numbers, NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = plain_names(load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; nothing was loaded") from error
    check_finite(weights, file)
    model = unwrap(model)
    weights = stored_as(weights, model)
    if resize:
        weights = fit_positions(weights, model)
    own = plain_names(model.state_dict())
    _compare(_shapes(own), _shapes(weights), file)
    for name, tensor in own.items():
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: {name} is {weights[name].dtype}, and in the model {tensor.dtype}; nothing was loaded"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def check_finite(weights: Mapping[str, Tensor], file: str | Path) -> None:
    """Raise CheckpointError where weights hold NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()  # eight bits have no sums of their own
        # The sum of finite numbers may overflow, which the numbers themselves then decide.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file}: {name} holds NaN or infinity; train again, or resume from an earlier checkpoint"
            )


def write_config(config: Any, kind: str, file: str | Path, details: dict[str, Any] | None = None) -> None:
    """Write a configuration as JSON with the kind of model that it builds; the file appears whole or not at all."""
    from ...utils.version import __version__

    text = json.dumps(
        {
            "omnimix": __version__,
            "format": FORMAT,
            "model": kind,
            "config": to_dict(config),
            "details": details or {},
        },
        indent=2,
    )
    replace_file(file, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def read_config(file: str | Path) -> dict[str, Any]:
    """What `write_config` wrote: "omnimix" (version), "format", "model", "config" (plain) and "details".

    Raises:
        CheckpointError: the file is missing, is not such a JSON file, or was written in a newer format.
    """
    try:
        with Path(file).open("rb") as opened:
            raw = opened.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        content = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; nothing was loaded") from error
    except RecursionError as error:
        raise CheckpointError(f"cannot read {file}: it is nested too deeply; nothing was loaded") from error
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        raise CheckpointError(f"{file} must hold 'model' and 'config', and does not; nothing was loaded")
    content = {"details": {}, "format": 1} | content
    for name, kind, what in (("model", str, "a name"), ("config", dict, "a mapping"), ("details", dict, "a mapping")):
        if not isinstance(content[name], kind):
            raise CheckpointError(f"{file} does not describe a model: {name} must be {what}; nothing was loaded")
    if type(content["format"]) is not int or content["format"] not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{file} has format {content['format']!r}, written by omnimix {content.get('omnimix', '?')}; this version "
            f"reads formats 1 to {FORMAT}: upgrade omnimix; nothing was loaded"
        )
    return content


def build_config(config_class: type, values: Any, file: str | Path) -> Any:
    """A configuration from a file's plain values; what is wrong with them is a CheckpointError."""
    try:
        return from_dict(config_class, values)
    except (ConfigError, UnknownName, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} does not describe a model: {error}; nothing was loaded") from error
