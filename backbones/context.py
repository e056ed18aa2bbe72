"""What a layer knows of its tokens beyond their values, and what layers hand on to later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import UnsupportedCall, UnsupportedShape
from ..utils.modes import autocast_enabled
from ..utils.private_torch import pytree
from .layout import Immutable, Layout, offsets


class Memory(NamedTuple):
    """Tokens with a length of their own that a layer reads: an encoder's, keys and values, another stage's.

    Args:
        tensors: by name, each `(n, s, ...)`: n sequences of s slots.
        positions: of each slot, `(n, s)` int64; −1 marks an empty one.
        layout: of the tokens, where their grid or boundaries matter to the reader.
    """

    tensors: dict[str, Tensor]
    positions: Int[Tensor, "n s"]
    layout: Layout | None = None


Shared = Mapping[str, "Tensor | Memory"]


class Context(Immutable):
    """Built once per batch and never changed; a pytree. A `Layout` stands for a context that holds nothing else.

    Args:
        layout: order, boundaries and grid of the tokens.
        positions: absolute position of each token, `(b, t)` or `(b, t, axes)`, int64; may have gaps. None: each token's
            index in its sequence. Backbones fill them in where a layer reads them.
        condition: what conditions the layers (time step, class, speaker): `(n, c)`, one per sequence, or `(b, t, c)`.
        keep: index `(b, k)` of the tokens whose outputs are wanted; None: all.
        shared: from the caller and from earlier layers, by name: tensors `(b, t, ...)`, which follow their tokens, and
            memories.
    """

    layout: Layout
    positions: Tensor | None
    condition: Tensor | None
    keep: Tensor | None
    shared: Shared

    def __init__(
        self,
        layout: Layout | None = None,
        *,
        positions: Tensor | None = None,
        condition: Tensor | None = None,
        keep: Tensor | None = None,
        shared: Shared | None = None,
    ):
        layout = Layout() if layout is None else layout
        self._set(layout=layout, positions=positions, condition=condition, keep=keep, shared=shared or {})

    @staticmethod
    def of(given: Context | Layout | None) -> Context:
        """A context, of a layout where only that is given.

        Raises:
            UnsupportedCall: it is neither.
        """
        if not isinstance(given, Context | Layout):
            raise UnsupportedCall(
                f"context is {given!r}; pass Layout(causal=True) as the second argument where each token sees those "
                "before it alone, Layout(causal=False) where it sees all, or a Context"
            )
        return Context(given) if isinstance(given, Layout) else given

    def replace(self, **values: Any) -> Context:
        """A context with these arguments in place of its own."""
        own = {name: getattr(self, name) for name in ("layout", "positions", "condition", "keep", "shared")}
        return Context(**{**own, **values})

    def with_shared(self, additions: Shared) -> Context:
        """A context whose `shared` also holds these; itself where there are none."""
        return self.replace(shared={**self.shared, **additions}) if additions else self

    def read(self, name: str, reader: str) -> Any:
        """What is shared under `name`.

        Raises:
            UnsupportedCall: nothing is; `reader` is named in the message.
        """
        if name not in self.shared:
            known = ", ".join(sorted(self.shared)) or "nothing"
            raise UnsupportedCall(
                f"{reader} reads {name!r}, which no earlier layer and no caller has put into context.shared (it holds "
                f"{known})"
            )
        return self.shared[name]

    def tensor(self, name: str, reader: str) -> Tensor:
        """The tensor (b, t, ...) that is shared under `name`.

        Raises:
            UnsupportedCall: nothing is, or a memory.
        """
        return self._read_as(Tensor, "a tensor (b, t, ...) with a row for each token", name, reader)

    def memory(self, name: str, reader: str, *tensors: str) -> Memory:
        """The memory that is shared under `name`, which must hold `tensors`.

        Raises:
            UnsupportedCall: nothing is, or something else.
        """
        wanted = (
            "a Memory, tokens with a length of their own: pass "
            f"Memory({{{tensors[0]!r}: ...}}, positions), or read a stage, as in 'stages.0'"
        )
        found = self._read_as(Memory, wanted, name, reader)
        if missing := [tensor for tensor in tensors if tensor not in found.tensors]:
            known = ", ".join(map(repr, found.tensors)) or "nothing"
            raise UnsupportedCall(f"{reader} reads {missing[0]!r} of the Memory {name!r}, which holds {known}")
        return found

    def _read_as(self, kind: type, wanted: str, name: str, reader: str) -> Any:
        found = self.read(name, reader)
        if not isinstance(found, kind):
            raise UnsupportedCall(
                f"{reader} reads {name!r} as {wanted}; context.shared holds a {type(found).__name__} there"
            )
        return found

    def positions_of(self, x: Tensor) -> Int[Tensor, "b t"]:
        """The tokens' positions in time: those given, along their first axis, or their indices in their sequences."""
        if self.positions is None:
            return self.layout.positions(x)
        return self.positions if self.positions.ndim == 2 else self.positions[..., 0]

    def condition_of(self, x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """The condition of each token: `(b, t, c)`, or `(b, 1, c)` where rows are sequences with one condition each.

        Args:
            x: the tokens.
            channels: how many the layer takes, c.
            dtype: of the layer's weights.

        Raises:
            UnsupportedCall: there is none.
            UnsupportedShape: it does not fit the tokens or the layer.
        """
        if self.condition is None:
            raise UnsupportedCall(
                "context.condition is None, and a layer is conditioned; pass Context(condition=...). One for each "
                "token (b, t, c) ends where a transition changes the tokens; one for each sequence (n, c) does not"
            )
        _check_condition(self.condition, self.layout, x, channels, dtype)
        if self.condition.ndim == 3:
            return self.condition
        if self.layout.cu_seqlens is None:
            return self.condition[:, None]
        return self.condition[self.layout.sequence_of(x)[0]][None]

    def check(self, x: Tensor) -> None:
        """Raise UnsupportedShape where `x` (b, t, d) does not fit."""
        self.layout.check(x)
        if self.condition is not None:
            _check_condition(self.condition, self.layout, x)
        for name, value in self.shared.items():
            _check_shared(name, value, x)
        if self.positions is not None and self.positions.shape[:2] != x.shape[:2]:
            raise UnsupportedShape(
                f"positions: shape {tuple(self.positions.shape)} is not (b, t) of x, {tuple(x.shape)}"
            )

    def take(self, index: Tensor, x: Tensor) -> tuple[Tensor, Context]:
        """A subset of the tokens of `x`, and its context: positions, per-token conditions and shared tensors follow.

        Args:
            index: `(b, k)` int64, the tokens that each row keeps, ascending; or a mask `(b, t)`, whose tokens are
                packed into one row.
            x: (b, t, d).

        Raises:
            UnsupportedShape: an index that does not fit.
        """
        layout, mask = self.layout, index.dtype == torch.bool
        if index.ndim != 2 or index.shape[0] != x.shape[0] or (mask and index.shape[1] != x.shape[1]):
            raise UnsupportedShape(f"index: shape {tuple(index.shape)} does not fit x, {tuple(x.shape)}")

        def pick(t: Tensor) -> Tensor:
            if mask:
                return t[index][None]
            return t.gather(1, index.reshape(*index.shape, *[1] * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]))

        cu_seqlens = layout.cu_seqlens
        if mask or cu_seqlens is not None:
            kept = (
                index if mask else torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, index, True)
            )
            owner = layout.sequence_of(x)[kept]
            counts = torch.zeros(layout.sequences(x.shape[0]), dtype=torch.int64, device=x.device)
            cu_seqlens = offsets(counts.index_add(0, owner, torch.ones_like(owner)))
        block = layout.block
        if block is not None:
            number = block if isinstance(block, Tensor) else layout.positions(x) // block
            block = pick(number)
        condition = self.condition
        if condition is not None:
            condition = pick(condition) if condition.ndim == 3 else condition
        positions = layout.positions(x) if self.positions is None else self.positions
        shared = {name: pick(value) if isinstance(value, Tensor) else value for name, value in self.shared.items()}
        taken = Context(
            Layout(causal=layout.causal, cu_seqlens=cu_seqlens, block=block),
            positions=pick(positions),
            condition=condition,
            shared=shared,
        )
        return pick(x), taken


def _check_condition(
    given: Tensor, layout: Layout, x: Tensor, channels: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raise UnsupportedShape where a condition does not fit the tokens, or the layer that it conditions."""
    (b, t), shape = x.shape[:2], tuple(given.shape)
    n = layout.sequences(b)
    if not (given.ndim == 2 and shape[0] == n) and not (given.ndim == 3 and shape[:2] == (b, t)):
        raise UnsupportedShape(
            f"context.condition: shape {shape} is neither ({n}, c), one condition for each sequence, nor "
            f"({b}, {t}, c), one for each token"
        )
    if channels is not None and shape[-1] != channels:
        raise UnsupportedShape(
            f"context.condition has {shape[-1]} channels, and the layer that it conditions takes {channels}"
        )
    # Autocast converts what is not double.
    converted = autocast_enabled(x.device.type) and given.dtype != torch.float64
    if not given.is_floating_point() or (dtype is not None and given.dtype != dtype and not converted):
        raise UnsupportedShape(
            f"context.condition is {given.dtype}; it must be {dtype or 'floating point'}, as the layers that it "
            "conditions: embed classes, and convert numbers"
        )


def _check_shared(name: str, value: Tensor | Memory, x: Tensor) -> None:
    """Raise UnsupportedShape where what is shared is no tensor of the tokens of `x`, and no memory."""
    if isinstance(value, Tensor):
        if value.shape[:2] != x.shape[:2]:
            raise UnsupportedShape(
                f"context.shared[{name!r}]: shape {tuple(value.shape)} does not begin with (b, t) of x, "
                f"{tuple(x.shape[:2])}; tokens with a length of their own are a Memory"
            )
    elif not isinstance(value, Memory):
        raise UnsupportedShape(f"context.shared[{name!r}] is a {type(value).__name__}; it must be a tensor or a Memory")
    elif any(tensor.shape[:2] != value.positions.shape for tensor in value.tensors.values()):
        shapes = {key: tuple(tensor.shape) for key, tensor in value.tensors.items()}
        raise UnsupportedShape(
            f"context.shared[{name!r}]: tensors of shapes {shapes} do not all begin with (n, s) of the positions, "
            f"{tuple(value.positions.shape)}"
        )


def as_memory(x: Tensor, context: Context) -> Memory:
    """Tokens (b, t, d) as a memory "x", for layers whose tokens are others."""
    return Memory({"x": x}, context.positions_of(x), context.layout)


_PARTS = ("layout", "positions", "condition", "keep", "shared")


def _flatten_with_keys(context: Context) -> tuple[list[tuple[Any, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(context, name)) for name in _PARTS], None


pytree.register_pytree_node(
    Context,
    lambda c: ([getattr(c, name) for name in _PARTS], None),
    lambda parts, _: Context(**dict(zip(_PARTS, parts, strict=True))),
    serialized_type_name="omnimix.Context",
    flatten_with_keys_fn=_flatten_with_keys,
)
