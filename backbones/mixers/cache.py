"""Caches of keys and values in which slot i holds what stands at position i, and their windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def extended(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """`cache` (n, s, g, d) with room for the tokens of `new` (n, t, g, d), each row's put in from its `position` on.

    Rows of different lengths leave empty slots at their ends, where nothing causal looks before they are filled.
    """
    index = position[:, None] + torch.arange(new.shape[1], device=new.device)
    index = index[..., None, None].expand_as(new)
    return F.pad(cache, (0, 0, 0, 0, 0, new.shape[1])).scatter(1, index, new)


def last(joined: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The last `size` tokens of each row of `joined` (n, size + t, ...), of whose t new ones each has its `lengths`."""
    index = lengths[:, None] + torch.arange(size, device=joined.device)
    return joined.gather(1, index[..., None, None].expand(-1, -1, *joined.shape[2:]))
