"""The cache of keys and values (or of whatever rows a mixer keeps of its tokens): how it grows, and what it keeps."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ....kernels.common.graphs import for_every_length
from ...layout import Layout, unpack
from ...state import State

# Slots of the smallest capacity that is kept for further tokens.
LEAST = 64


class KVCache:
    """Rows of the tokens that were read, in the order in which they came; keeps all of them.

    Its state holds the rows by name, (n, s, ...), "ranks" (n, s), the number of the token in each slot, counted from 0
    in its sequence, −1 where the slot is empty, and "count" (n,), how many tokens were read. Ranks say what is earlier;
    positions (`Context.positions`) say where a token stands, and may have gaps.

    Args:
        shapes: of one token's row, by name; a row called "positions" holds those of the tokens, int64, −1 where a slot
            is empty.
    """

    # Slots of a cache that does not grow.
    slots: int | None = None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = dict(shapes)

    def empty(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state after zero tokens."""
        slots, kind = self.slots or 0, {"device": device, "dtype": torch.int64}
        rows = {
            name: torch.full((batch, slots), -1, **kind)
            if name == "positions"
            else torch.zeros(batch, slots, *shape, device=device, dtype=dtype)
            for name, shape in self.shapes.items()
        }
        return State({**rows, "ranks": torch.full((batch, slots), -1, **kind), "count": torch.zeros(batch, **kind)})

    def grown(self, rows: Mapping[str, Tensor], layout: Layout, state: State | None) -> State:
        """The rows before and the new ones, one sequence a row of the batch.

        Args:
            rows: of the new tokens, (b, t, ...) by name.
            layout: of the new tokens; packed ones are unpacked.
            state: of the tokens before; None where there are none.
        """
        some = next(iter(rows.values()))
        count = layout.lengths(some)
        ranks = layout.positions(some, None if state is None else state["count"])
        if layout.cu_seqlens is not None:
            rows = {name: unpack(row, layout.cu_seqlens, fill=-(name == "positions")) for name, row in rows.items()}
            ranks = unpack(ranks, layout.cu_seqlens, fill=-1)
        if state is None:
            return State({**rows, "ranks": ranks, "count": count})
        return State(
            {
                **{name: appended(state[name], row) for name, row in rows.items()},
                "ranks": appended(state["ranks"], ranks),
                "count": state["count"] + count,
            }
        )

    def kept(self, grown: State) -> State:
        """What remains of `grown` for later calls."""
        return grown

    def fresh(self, rows: Mapping[str, Tensor], layout: Layout) -> State:
        """What remains of the first tokens."""
        return self.kept(self.grown(rows, layout, None))


class WindowCache(KVCache):
    """Keeps the last `window` − 1 tokens and the first `sinks`.

    Args:
        shapes: of one token's row, by name.
        window: tokens that a token sees, its own included.
        sinks: first tokens of the sequence that every later token sees.
    """

    slots: int

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, window: int, sinks: int = 0):
        super().__init__(shapes)
        self.window, self.sinks = window, sinks
        self.slots = window - 1 + sinks

    def kept(self, grown: State) -> State:
        ranks, count = grown["ranks"], grown["count"]
        # A graph that is exported serves every length.
        missing = self.slots if for_every_length() else max(0, self.slots - ranks.shape[1])
        ranks = F.pad(ranks, (missing, 0), value=-1)
        needed = (ranks > count[:, None] - self.window) | (ranks < self.sinks)
        ranks, index = torch.where(needed, ranks, -1).topk(self.slots, dim=1)
        rows = {}
        for name in self.shapes:
            row = F.pad(grown[name], (0, 0) * len(self.shapes[name]) + (missing, 0))
            tail = (1,) * len(self.shapes[name])
            row = row.gather(1, index.view(*index.shape, *tail).expand(*index.shape, *row.shape[2:]))
            rows[name] = row.masked_fill((ranks < 0).view(*index.shape, *tail), 0)
        return State({**rows, "ranks": ranks, "count": count})

    def fresh(self, rows: Mapping[str, Tensor], layout: Layout) -> State:
        some = next(iter(rows.values()))
        n, t = some.shape[:2]
        # A graph that is exported serves every length, and here sequences of different ones.
        if layout.cu_seqlens is not None or for_every_length():
            return super().fresh(rows, layout)

        def cut(x: Tensor, empty: int = 0) -> Tensor:
            """The latest first, as `kept` has them; where there are few tokens all of them, then empty slots."""
            if t <= self.slots:
                return F.pad(x.flip(1), (0, 0) * (x.ndim - 2) + (0, self.slots - t), value=empty)
            last = x[:, t - (self.window - 1) :].flip(1)
            return last if not self.sinks else torch.cat([last, x[:, : self.sinks].flip(1)], dim=1)

        ranks = cut(torch.arange(t, device=some.device)[None], -1).expand(n, -1)
        count = torch.full((n,), t, device=some.device)
        return State({**{name: cut(row) for name, row in rows.items()}, "ranks": ranks, "count": count})

    def rolled(self, rows: Mapping[str, Tensor], ranks: Int[Tensor, "n 1"], state: State) -> tuple[State, State]:
        """`grown` and `kept` for one new token a sequence, without sinks: it takes the place of the oldest slot, or of
        an empty one; `kept` puts both last."""
        grown = {name: torch.cat([row, state[name]], dim=1) for name, row in rows.items()}
        grown["ranks"] = torch.cat([ranks, state["ranks"]], dim=1)
        count = state["count"] + 1
        kept = {name: row[:, :-1] for name, row in grown.items()}
        return State({**grown, "count": count}), State({**kept, "count": count})


class DenseCache(KVCache):
    """Keeps all tokens, and slot i holds token i of its sequence, for blocks of keys that are found by their number.

    Sequences of different lengths leave empty slots at their ends, where nothing causal looks before they are filled.
    """

    def empty(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        return self._without_ranks(super().empty(batch, device=device, dtype=dtype))

    def grown(self, rows: Mapping[str, Tensor], layout: Layout, state: State | None) -> State:
        if state is None:
            return self._without_ranks(super().grown(rows, layout, None))
        count = layout.lengths(next(iter(rows.values())))
        if layout.cu_seqlens is not None:
            rows = {name: unpack(row, layout.cu_seqlens) for name, row in rows.items()}
        rows = {name: extended(state[name], row, state["count"]) for name, row in rows.items()}
        return State({**rows, "count": state["count"] + count})

    def _without_ranks(self, state: State) -> State:
        return State({name: part for name, part in state.parts.items() if name != "ranks"})


class _Room:
    """Memory after a cache, of which `used` slots are written; `filled` where none of these is empty (−1)."""

    def __init__(self, cache: Tensor, slots: int):
        self.used = cache.shape[1]
        self.buffer = cache.new_empty(cache.shape[0], slots, *cache.shape[2:])
        self.buffer[:, : self.used] = cache
        self.filled = not cache.is_floating_point() and bool((cache >= 0).all())

    def claim(self, before: int, stop: int, filled: bool) -> bool:
        """Take the slots from `before` to `stop`, if nobody has taken them; `filled`: whether none becomes empty."""
        with _claiming:
            if self.used != before or stop > self.buffer.shape[1]:
                return False
            self.used = stop
            self.filled = self.filled and filled
            return True


# The spare memory of each cache that `appended` returned, or None. It is not kept in the tensors, which may be pickled
# or copied.
_rooms = WeakIdKeyDictionary()
_claiming = threading.Lock()


def appended(cache: Tensor, new: Tensor) -> Tensor:
    """`torch.cat([cache, new], dim=1)`; without gradients in a time that does not depend on the cache's length.

    What was appended to before has spare capacity, into which the next call writes. No tensor that was returned is ever
    changed: a slot is written once, by whoever first resumes from the last one, and others get a copy.
    """
    before, stop = cache.shape[1], cache.shape[1] + new.shape[1]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or cache.dtype != new.dtype:
        return torch.cat([cache, new], dim=1)
    if cache not in _rooms:
        # It may never be appended to again: a window is cut, and a beam search selects.
        grown = torch.cat([cache, new], dim=1)
        _rooms[grown] = None
        return grown
    # A single new token is one in every row; of several, the shorter rows lack some.
    filled = new.shape[1] == 1 or bool((new >= 0).all())
    room = _rooms[cache]
    # A tensor made in inference mode may only be written there, and one made elsewhere would be marked as changed.
    if room is None or room.buffer.is_inference() != torch.is_inference_mode_enabled():
        room = _Room(cache, stop + max(LEAST, stop // 2))
    if not room.claim(before, stop, filled):
        room = _Room(cache, stop + max(LEAST, stop // 2))
        room.claim(before, stop, filled)
    room.buffer[:, before:stop] = new
    grown = room.buffer[:, :stop]
    _rooms[grown] = room
    return grown


def known_filled(slots: Tensor) -> bool:
    """Whether it is known, without a look at the values, that none of the positions `slots` (n, s) is −1, empty."""
    if torch.compiler.is_compiling():
        return False
    room = _rooms.get(slots)
    return room is not None and room.filled


def extended(cache: Tensor, new: Tensor, count: Int[Tensor, " n"]) -> Tensor:
    """`cache` (n, s, g, d) and the tokens of `new` (n, t, g, d), each row's from slot `count` on."""
    index = count[:, None] + torch.arange(new.shape[1], device=new.device)
    index = index[..., None, None].expand_as(new)
    # Under autocast a cache may be of float32, and what is new of bfloat16.
    dtype = torch.promote_types(cache.dtype, new.dtype)
    return F.pad(cache.to(dtype), (0, 0, 0, 0, 0, new.shape[1])).scatter(1, index, new.to(dtype))


def last(joined: Tensor, lengths: Tensor | None, size: int) -> Tensor:
    """The last `size` tokens of each row of `joined` (n, size + t, ...), of whose t new ones each has its `lengths`;
    all of them where that is None."""
    if lengths is None:
        return joined[:, joined.shape[1] - size :]
    index = lengths[:, None] + torch.arange(size, device=joined.device)
    return joined.gather(1, index[..., None, None].expand(-1, -1, *joined.shape[2:]))
