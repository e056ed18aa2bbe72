"""What each parameter says of itself: whether weight decay may touch it, whether its initial values are its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SPARED = "_spared_from_decay"
_INITIALISED = "_initialised"


def mark(module: nn.Module, *names: str, decay: bool = True, initialised: bool = False) -> None:
    """Say of parameters of a module whether weight decay applies and whether the module has initialised them for good.

    The module knows it, and not the parameters: copies, moves from the meta device, `load_state_dict(assign=True)` and
    accelerate put new ones in their places.
    """
    for kind, wanted in ((_SPARED, not decay), (_INITIALISED, initialised)):
        if wanted:
            module.__dict__.setdefault(kind, set()).update(names)


def _marked(module: nn.Module, kind: str) -> set[str]:
    """Names of the parameters below `module` that are marked so."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part.__dict__.get(kind, ())
    }


def no_weight_decay(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: vectors and scalars, and those marked so."""
    marked = _marked(module, _SPARED)
    return {name for name, p in module.named_parameters() if p.ndim <= 1 or name in marked}


def linear_std(inputs: int) -> float:
    """The standard deviation at which the weights of a linear map of so many inputs start: 1 / √(3 · inputs).

    It is that of torch's own default for linear layers, which mamba_ssm keeps; at width 768 it is 0.0208, close to
    GPT-2's constant 0.02.
    """
    return (3 * inputs) ** -0.5


def initialise(module: nn.Module) -> None:
    """Give every linear layer below `module` a truncated normal weight and a zero bias, unless it is marked."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        own = layer.__dict__.get(_INITIALISED, ())
        if "weight" not in own:
            nn.init.trunc_normal_(layer.weight, std=linear_std(layer.in_features))
        if layer.bias is not None and "bias" not in own:
            nn.init.zeros_(layer.bias)


def scale_residual_outputs(layers: list[nn.Module], branches: int) -> None:
    """Divide the weights of the layers that write into the residual stream by the square root of its branches (GPT-2).

    Args:
        layers: tied blocks may name one several times.
        branches: how many mixers and feed-forward layers add to the stream, as mamba_ssm counts them.
    """
    weights: dict[int, Any] = {id(layer.weight): layer.weight for layer in layers}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(branches**-0.5)
