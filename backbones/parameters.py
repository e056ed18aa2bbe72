"""What each parameter says of itself: whether weight decay may touch it, whether its initial values are its own."""

from __future__ import annotations

import torch
from torch import nn

_DECAY = "omnimix_decay"
_INITIALISED = "omnimix_initialised"
_KEPT = "_not_decayed"


def mark(parameter: nn.Parameter, *, decay: bool = True, initialised: bool = False) -> nn.Parameter:
    """Say of a parameter whether weight decay applies and whether its module has initialised it for good."""
    setattr(parameter, _DECAY, decay)
    setattr(parameter, _INITIALISED, initialised)
    return parameter


def remember_marks(module: nn.Module) -> None:
    """Let every module below `module` know which of its parameters are marked not to decay.

    A copy, a move from the meta device and `load_state_dict(assign=True)` put new parameters in, without marks.
    """
    for part in module.modules():
        names = {name for name, p in part.named_parameters(recurse=False) if not getattr(p, _DECAY, True)}
        if names:
            part.__dict__.setdefault(_KEPT, set()).update(names)


def no_weight_decay(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: vectors and scalars, and those marked so."""
    marked = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part.__dict__.get(_KEPT, ())
    }
    return {
        name for name, p in module.named_parameters() if p.ndim <= 1 or name in marked or not getattr(p, _DECAY, True)
    }


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
        if not getattr(layer.weight, _INITIALISED, False):
            nn.init.trunc_normal_(layer.weight, std=linear_std(layer.in_features))
        if layer.bias is not None and not getattr(layer.bias, _INITIALISED, False):
            nn.init.zeros_(layer.bias)


def scale_residual_outputs(layers: list[nn.Module], branches: int) -> None:
    """Divide the weights of the layers that write into the residual stream by the square root of its branches (GPT-2).

    Args:
        layers: tied blocks may name one several times.
        branches: how many mixers and feed-forward layers add to the stream, as mamba_ssm counts them.
    """
    weights = {id(layer.weight): layer.weight for layer in layers}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(branches**-0.5)
