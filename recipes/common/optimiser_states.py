"""Saved states of optimisers, matched with the parameters by their names."""

from __future__ import annotations

from typing import Any

import torch

from ...backbones.serialization import current_name
from ...errors import CheckpointError


def match_by_name(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose parameters are in the optimiser's order, whatever theirs was.

    Version 0.1 wrote no names; its parameters are in today's order.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    groups = state["param_groups"]
    own = [group["param_names"] for group in optimizer.param_groups]
    named = all("param_names" in group for group in groups)
    found = [group["param_names"] for group in groups] if named else own
    sizes = [len(group["params"]) for group in groups]
    if not named and sizes != [len(names) for names in own]:
        raise CheckpointError(
            f"the optimiser's state is of another model: its groups have {sizes} parameters, and the optimiser's "
            f"{[len(names) for names in own]}"
        )
    saved = {
        current_name(name): key
        for group, names in zip(groups, found, strict=True)
        for name, key in zip(names, group["params"], strict=True)
    }
    if other := sorted(saved.keys() ^ {name for names in own for name in names}):
        raise CheckpointError(f"the optimiser's state is of another model: only one of them has {other[0]!r}")
    if len(groups) != len(own):
        raise CheckpointError(
            f"the optimiser's state has {len(groups)} groups of parameters, and the optimiser {len(own)}"
        )
    groups = [
        group | {"params": [saved[name] for name in names], "param_names": list(names)}
        for group, names in zip(groups, own, strict=True)
    ]
    return state | {"param_groups": groups}


def keyed_by_name(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """As `match_by_name`, with the names of the parameters for their keys, as torch's distributed checkpoints have it.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    state = match_by_name(optimizer, state)
    groups = state["param_groups"]
    names = {key: name for group in groups for key, name in zip(group["params"], group["param_names"], strict=True)}
    return state | {
        "state": {names[key]: kept for key, kept in state["state"].items()},
        "param_groups": [group | {"params": group["param_names"]} for group in groups],
    }
