"""The cache of our models in transformers' `generate`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones.state import State
from ..errors import UnsupportedCall


class OmnimixCache:
    """The states of a batch of sequences, as transformers carries a cache through `generate`.

    Like transformers' own it is changed in place; copy.deepcopy keeps a prompt's for further use.

    Args:
        state: of the backbone; None before the first token.
        length: columns of tokens that were read, padding included.
    """

    is_compileable = False
    is_croppable = False
    # With True `generate` would not ask `get_seq_length`, and hand over again what was read before.
    is_linear = (False,)

    def __init__(self, state: State | None = None, length: int = 0):
        self.state = state
        self.length = length

    def update(self, state: State, read: int) -> None:
        self.state, self.length = state, self.length + read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Memory that the state holds."""
        return 0 if self.state is None else self.state.nbytes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx`, in that order; repeats are allowed."""
        if self.state is not None:
            self.state = self.state.select(beam_idx.to(self.state["read"].device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        if self.state is not None:
            rows = torch.arange(len(self.state["read"]))
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        self.state, self.length = None, 0

    def crop(self, max_length: int) -> None:
        raise UnsupportedCall(
            "a recurrent state cannot forget its last tokens, which crop asks for; keep a copy.deepcopy of the cache "
            "at the place to return to"
        )
