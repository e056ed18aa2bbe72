"""What each parameter says of itself: whether weight decay may touch it, whether its initial values are its own."""

from __future__ import annotations

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


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Give every linear layer below `module` a truncated normal weight and a zero bias, unless it is marked."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        own = layer.__dict__.get(_INITIALISED, ())
        if "weight" not in own:
            nn.init.trunc_normal_(layer.weight, std=std)
        if layer.bias is not None and "bias" not in own:
            nn.init.zeros_(layer.bias)


def scale_residual_outputs(layers: list[nn.Module], depth: int) -> None:
    """Shrink the layers that write into the residual stream by sqrt(2 · depth) (GPT-2)."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_((2 * depth) ** -0.5)
