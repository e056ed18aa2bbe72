"""What a long prompt leaves behind, read once and reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..language import LanguageModel
from .prefill import States, as_lists, check_decoder, evaluating, read


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A text that was read.

    Args:
        state: after its last token, of one sequence.
        logits: of the next token, float32 or wider.
        tokens: its ids, which a repetition penalty looks at.
    """

    state: States
    logits: Float[Tensor, "1 v"]
    tokens: list[int]

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return len(self.tokens)


def read_prefix(model: LanguageModel, tokens: Sequence[int] | Int[Tensor, "t"], *, chunk: int | None = None) -> Prefix:
    """Read a text once, for `generate` and `stream` to go on from.

    Args:
        tokens: ids.
        chunk: tokens that are read at a time, to bound the memory; all by default.

    Raises:
        UnsupportedCall: the model is not decoded token by token, with the remedy.
        UnsupportedShape: no token, or ids outside the vocabulary.
    """
    check_decoder(model)
    rows = as_lists([list(map(int, tokens))], model.vocabulary, empty=False)
    with evaluating(model), torch.inference_mode():
        logits, state = read(model, rows, chunk)
    return Prefix(state=state, logits=logits, tokens=rows[0])
