"""Models as folders: `model.safetensors` beside `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones.serialization import current_name, from_dict, to_dict
from ...errors import CheckpointError, ConfigError
from ...utils.files import replace_file, replace_tensors
from .grid import fit_positions

# Of what `write_config` writes. Version 0.1 wrote none, which is 1.
FORMAT = 2
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Marks that torch.compile and data parallel wrappers leave in parameter names.
_WRAPPERS = ("_orig_mod.", "module.")


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in today's names, without the marks that torch.compile and data-parallel wrappers leave in them."""
    plain = {}
    for name, tensor in weights.items():
        name = name.replace(_WRAPPERS[0], "")
        plain[current_name(name.removeprefix(_WRAPPERS[1]))] = tensor
    return plain


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def first_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """Each name of a state dict -> the first name of its tensor: blocks that share weights name them several times."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() and not t.is_meta else name, name)
        for name, t in weights.items()
    }


def save_weights(model: nn.Module, file: str | Path) -> None:
    """Write a module's state dict as safetensors, each tensor once; the file appears whole or not at all."""
    state = plain_names(unwrap(model).state_dict())
    first = first_names(state)
    weights = {name: t.detach().cpu().contiguous() for name, t in state.items() if first[name] == name}
    replace_tensors(file, weights, {"format": "pt"})


def load_weights(model: nn.Module, file: str | Path, *, resize: bool = False) -> None:
    """Load a safetensors file into a module, all of it or nothing.

    Args:
        resize: fit position tables that were made for another image size.

    Raises:
        CheckpointError: the file is missing or corrupt, or its names or shapes are not the module's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = plain_names(load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; nothing was loaded") from error
    model = unwrap(model)
    for name, module in model.named_modules():
        if hasattr(module, "upgrade_state"):
            module.upgrade_state(weights, f"{name}." if name else "")
    if resize:
        weights = fit_positions(weights, model)
    own = plain_names(model.state_dict())
    for name, first in first_names(own).items():
        if name not in weights and first in weights:
            weights[name] = weights[first]
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is unknown to the model" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, and in the model {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{file} does not fit the model: {shown}; nothing was loaded")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


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
        CheckpointError: the file is missing, is no such JSON, or was written in a newer format.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; nothing was loaded") from error
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        raise CheckpointError(f"{file} must hold 'model' and 'config', and does not; nothing was loaded")
    content = {"details": {}, "format": 1} | content
    if content["format"] not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{file} has format {content['format']!r}, written by omnimix {content.get('omnimix', '?')}; this version "
            f"reads formats 1 to {FORMAT}: upgrade omnimix; nothing was loaded"
        )
    return content


def build_config(config_class: type, values: Any, file: str | Path) -> Any:
    """A configuration from a file's plain values; what is wrong with them is a CheckpointError."""
    try:
        return from_dict(config_class, values)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe a model: {error}; nothing was loaded") from error
