"""What layers remember between two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.private_torch import pytree


class State:
    """Named tensors, each with the sequences of the batch along dimension 0, or nested states.

    One of a backbone holds those of its layers. A pytree: torch's pytrees and torch.compile look inside. It is
    never changed in place: forward returns a new one, so that an old one may be kept and resumed from, and the gradient
    flows through it.
    """

    def __init__(self, parts: Mapping[str, Tensor | State]):
        self._parts = parts

    @property
    def parts(self) -> Mapping[str, Tensor | State]:
        """The tensors and nested states by name."""
        return self._parts

    def __repr__(self) -> str:
        inside = (f"{k}={v!r}" if isinstance(v, State) else f"{k}={tuple(v.shape)}" for k, v in self._parts.items())
        return f"State({', '.join(inside)})"

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def get(self, name: str) -> Any:
        """The part of that name, or None."""
        return self._parts.get(name)

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its path, as in "blocks.3/mixer/k"."""
        for name, part in self._parts.items():
            if isinstance(part, State):
                yield from part.named_tensors(f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}", part

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """A state with `function` applied to every tensor."""
        return State({k: v.map(function) if isinstance(v, State) else function(v) for k, v in self._parts.items()})

    def tensors(self) -> list[Tensor]:
        """Every tensor, nested ones included, in a fixed order."""
        return [t for v in self._parts.values() for t in (v.tensors() if isinstance(v, State) else [v])]

    def select(self, index: Tensor) -> State:
        """The states of the sequences `index` (int64), in that order; repeats are allowed (beam search)."""
        return self.map(lambda t: t.index_select(0, index))

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The sequences of several states of one layer, concatenated.

        Parts that grow with what was read are filled up at their ends as empty slots are: with zeros, and positions
        (int64) with −1.
        """
        return State({name: _joined([s[name] for s in states]) for name in states[0]})

    def detach(self) -> State:
        """The same values without their history (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> State:
        """The same state on a device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    @property
    def nbytes(self) -> int:
        """Memory that the tensors hold."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _joined(parts: list[Any]) -> Tensor | State:
    if isinstance(parts[0], State):
        return State.join(parts)
    sizes = [max(shape) for shape in zip(*(p.shape[1:] for p in parts), strict=True)]
    fill = -1 if parts[0].dtype == torch.int64 else 0
    padded = []
    for p in parts:
        missing = [n for size, own in zip(reversed(sizes), reversed(p.shape[1:]), strict=True) for n in (0, size - own)]
        padded.append(F.pad(p, missing, value=fill) if any(missing) else p)
    return torch.cat(padded)


# What holds nothing but tensors and names may be read by torch.load(weights_only=True).
torch.serialization.add_safe_globals([State])


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in state.parts.items()], list(state)


pytree.register_pytree_node(
    State,
    lambda state: (list(state._parts.values()), list(state._parts)),
    lambda values, names: State(dict(zip(names, values, strict=True))),
    serialized_type_name="omnimix.State",
    flatten_with_keys_fn=_flatten_with_keys,
)
