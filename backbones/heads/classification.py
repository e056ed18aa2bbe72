"""One label for a whole sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import UnsupportedCall
from ..config import fraction, not_negative
from ..layout import Layout
from ..typed import Config


@dataclass(frozen=True, kw_only=True)
class ClassificationHeadConfig(Config):
    """Options of a classification head.

    Args:
        classes: number of logits; 0 leaves the classifier out, and the head returns the pooled features.
        pool: "mean" or "max" of the grid tokens (class token and registers left out); "class_token", the first of the
            layout's extra tokens; "none", a prediction for every token.
        dropout: of the pooled features.
    """

    classes: int = 1000
    pool: Literal["mean", "max", "class_token", "none"] = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        not_negative(self, "classes")
        fraction(self, "dropout")


def split_tokens(
    tokens: Float[Tensor, "b t d"], layout: Layout
) -> tuple[Float[Tensor, "b grid d"], Float[Tensor, "b extra d"]]:
    """The tokens of the grid, and the others (class token, registers), each in order."""
    if not layout.extra:
        return tokens, tokens[:, :0]
    edges = (-1, *layout.extra, tokens.shape[1])
    # Slices between the extra tokens instead of an index: nothing is gathered.
    runs = [tokens[:, a + 1 : b] for a, b in pairwise(edges) if b > a + 1]
    grid = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
    return grid, torch.cat([tokens[:, i : i + 1] for i in layout.extra], dim=1)


def _alone(tokens: Tensor, layout: Layout, start: int, stop: int) -> tuple[Float[Tensor, "1 t d"], Layout]:
    """One of several packed sequences, and its own layout."""
    extra = tuple(at - start for at in layout.extra if start <= at < stop)
    return tokens[:, start:stop], Layout(causal=False, grid=(stop - start - len(extra), 1, 1), extra=extra)


class ClassificationHead(nn.Module):
    """Pools the tokens of a sequence and gives its logits."""

    def __init__(self, dim: int, config: ClassificationHeadConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.classifier: nn.Module = nn.Identity()
        if config.classes:
            self.classifier = nn.Linear(dim, config.classes)
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Float[Tensor, "b t d"], layout: Layout) -> Float[Tensor, "n *t classes"]:
        """Logits `(n, classes)` of n sequences: the rows, or the packed sequences (layout.cu_seqlens) of the one row.

        With `pool="none"` those of every token, `(b, t, classes)`.

        Raises:
            UnsupportedCall: a class token asked for where the layout has none.
        """
        return self.classifier(self.features(tokens, layout))

    def features(self, tokens: Float[Tensor, "b t d"], layout: Layout) -> Float[Tensor, "n *t d"]:
        """What the classifier is given: the pooled tokens after dropout."""
        return self.dropout(self._pool(tokens, layout))

    def _pool(self, tokens: Tensor, layout: Layout) -> Tensor:
        layout.check(tokens)
        pool = self.config.pool
        if pool == "none":
            return tokens
        if layout.cu_seqlens is not None:
            boundaries = layout.cu_seqlens.tolist()
            return torch.cat([self._pool(*_alone(tokens, layout, *ends)) for ends in pairwise(boundaries)])
        if pool == "class_token":
            if not layout.extra:
                raise UnsupportedCall(
                    "pool='class_token', but layout.extra is empty: the tokenizer adds no class token"
                )
            return tokens[:, layout.extra[0]]
        tokens, _ = split_tokens(tokens, layout)
        return tokens.mean(1) if pool == "mean" else tokens.amax(1)
