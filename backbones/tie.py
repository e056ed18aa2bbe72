"""Blocks that share their modules between depths (Zamba, arXiv 2405.16712; ALBERT, arXiv 1909.11942)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from .block import Block


def tie_blocks(blocks: Sequence[Block], names: Sequence[str | None]) -> None:
    """Let all blocks of one name have the leaf modules and parameters of the first, but for what is kept per use.

    Raises:
        ConfigError: blocks of one name differ.
    """
    first: dict[str, Block] = {}
    for i, (block, name) in enumerate(zip(blocks, names, strict=True)):
        if name is None:
            continue
        if name not in first:
            first[name] = block
        elif dict(_shapes(block)) != dict(_shapes(first[name])):
            raise ConfigError(f"tie={name!r}: block {i} differs from the first one of that name; make them equal")
        else:
            _tie(block, first[name])


def _shapes(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Size]]:
    """The shapes of the parameters by name, but for what is kept per use."""
    own = getattr(module, "per_use", ())
    for name, parameter in module.named_parameters(recurse=False):
        if name not in own:
            yield prefix + name, parameter.shape
    for name, child in module.named_children():
        if name not in own:
            yield from _shapes(child, f"{prefix}{name}.")


def _tie(module: nn.Module, first: nn.Module) -> None:
    own = getattr(module, "per_use", ())
    for name, parameter in first.named_parameters(recurse=False):
        if name not in own:
            share(module, name, parameter)
    for name, child in first.named_children():
        if name in own:
            continue
        if hasattr(child, "per_use") or any(True for _ in child.children()):
            _tie(getattr(module, name), child)
        else:
            setattr(module, name, child)


def share(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let a parameter of another module stand in this one too.

    Not by assignment: accelerate's `init_empty_weights` puts a new parameter into each place that is assigned to.
    """
    module._parameters[name] = parameter


class SharingModule(nn.Module):
    """A module some of whose parameters stand in several places, and stay shared whatever puts new ones there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_after_loading)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        shared = shared_parameters(self)
        super()._apply(*args, **kwargs)
        share_again(shared)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_shared"] = shared_parameters(self)
        super()._load_from_state_dict(*args, **kwargs)


def _after_loading(module: SharingModule, _: Any) -> None:
    share_again(module.__dict__.pop("_shared", []))


Slots = list[list[tuple[nn.Module, str]]]


def shared_parameters(module: nn.Module) -> Slots:
    """The places of each parameter that has several, as (module, name)."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    return [slots for slots in places.values() if len(slots) > 1]


def share_again(shared: Slots) -> None:
    """Give all places of a parameter the first one's.

    `to_empty`, and `load_state_dict(assign=True)`, put a new parameter into each place for itself.
    """
    for (first, name), *others in shared:
        for module, own in others:
            module._parameters[own] = first._parameters[name]
