"""Parameters that a fit leaves as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from ...errors import ConfigError, UnknownName


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter that a pattern names. Batch norms whose parameters are all frozen keep their statistics.

    Args:
        module: the recipe's, whose names begin with those of its `model`.
        patterns: see `TrainingConfig`.

    Raises:
        UnknownName: a pattern that no name fits, with the nearest.
        ConfigError: nothing is left to train.
    """
    model = module.get_submodule("model") if hasattr(module, "model") else module
    names = [name for name, _ in model.named_parameters()]
    known = [*names, *(name for name, _ in model.named_modules() if name)]
    for pattern in patterns:
        frozen = [name for name in names if name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)]
        if not frozen:
            raise UnknownName("training.freeze", pattern, known)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"training.freeze is {list(patterns)}, which leaves nothing to train; leave 'head' out of it")
    for part in model.modules() if patterns else ():
        own = list(part.parameters(recurse=False))
        if getattr(part, "running_mean", None) is not None and own and not any(p.requires_grad for p in own):
            part.eval()
