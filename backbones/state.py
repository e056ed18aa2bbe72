"""What a mixer remembers between two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


class State:
    """Named tensors, each with the sequences of the batch along dimension 0, or nested states.

    A pytree: `torch.utils._pytree` and torch.compile look inside. It is never changed in place: forward returns a new
    one, and the gradient flows through it.
    """

    def __init__(self, parts: dict[str, Tensor | State]):
        self._parts = parts

    @property
    def parts(self) -> dict[str, Tensor | State]:
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
        """The sequences of several states of one mixer, behind each other.

        Parts that grow with what was read are filled up at their ends as empty slots are: with zeros, and integers
        with −1.
        """
        return State({name: _joined([s[name] for s in states]) for name in states[0]})

    def detach(self) -> State:
        """The same values without their history (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    @property
    def nbytes(self) -> int:
        """Memory that the tensors hold."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _joined(parts: list[Tensor] | list[State]) -> Tensor | State:
    if isinstance(parts[0], State):
        return State.join(parts)
    sizes = [max(shape) for shape in zip(*(p.shape[1:] for p in parts), strict=True)]
    fill = 0 if parts[0].is_floating_point() or parts[0].is_complex() else -1
    padded = []
    for p in parts:
        missing = [n for size, own in zip(reversed(sizes), reversed(p.shape[1:]), strict=True) for n in (0, size - own)]
        padded.append(F.pad(p, missing, value=fill) if any(missing) else p)
    return torch.cat(padded)


pytree.register_pytree_node(
    State,
    lambda state: (list(state._parts.values()), list(state._parts)),
    lambda values, names: State(dict(zip(names, values, strict=True))),
    serialized_type_name="omnimix.State",
)
