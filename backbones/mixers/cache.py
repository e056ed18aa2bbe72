"""Caches of keys and values: how they grow, and their windows."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Slots of the smallest room that is kept for further tokens.
LEAST = 64


class _Room:
    """Memory behind a cache, of which `used` slots are written; `filled` where none of these is empty (−1)."""

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


# Of each cache that `appended` returned, its room, or None. Beside the tensors, which may be pickled or copied.
_rooms = WeakIdKeyDictionary()
_claiming = threading.Lock()


def appended(cache: Tensor, new: Tensor) -> Tensor:
    """`torch.cat([cache, new], dim=1)`; without gradients in a time that does not depend on the cache's length.

    What was appended to before then has room behind it, which the next call writes into. No tensor that was returned is
    ever changed: a slot is written once, by whoever is first to go on from the last one, and others get a copy.
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


def extended(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """`cache` (n, s, g, d) with room for the tokens of `new` (n, t, g, d), each row's put in from its `position` on.

    Rows of different lengths leave empty slots at their ends, where nothing causal looks before they are filled.
    """
    index = position[:, None] + torch.arange(new.shape[1], device=new.device)
    index = index[..., None, None].expand_as(new)
    # Under autocast a cache may be of float32, and what is new of bfloat16.
    dtype = torch.promote_types(cache.dtype, new.dtype)
    return F.pad(cache.to(dtype), (0, 0, 0, 0, 0, new.shape[1])).scatter(1, index, new.to(dtype))


def last(joined: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The last `size` tokens of each row of `joined` (n, size + t, ...), of whose t new ones each has its `lengths`."""
    index = lengths[:, None] + torch.arange(size, device=joined.device)
    return joined.gather(1, index[..., None, None].expand(-1, -1, *joined.shape[2:]))
