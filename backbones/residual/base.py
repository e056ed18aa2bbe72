"""What every residual form is: it owns the stream that runs through the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ResidualConfig, Site
from ..context import Context
from ..layer import Output, SequenceLayer
from ..registry import Registry
from ..state import State


class Residual(nn.Module, ABC):
    """Normalisation, what is added to what, and stochastic depth, around one layer of a block.

    Attributes:
        stream: what the stream is, its options included; blocks of one stage share it. "tokens" is (b, t, d).
        drops: whether a sequence may skip the layer, so that `drop_path` has an effect.
        reads: names in `Context.shared` that it needs; "condition" stands for `Context.condition`.
        drop_path: the rate at which a sequence skips the layer, in training (arXiv 1603.09382).
    """

    stream: str = "tokens"
    drops: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dim: int, config: ResidualConfig, site: Site, drop_path: float):
        super().__init__()
        self.drop_path = drop_path

    def open(self, x: Float[Tensor, "b t d"]) -> Tensor:
        """Tokens to the stream, where a stage begins."""
        return x

    def close(self, stream: Tensor) -> Float[Tensor, "b t d"]:
        """The stream back to tokens, where a stage ends."""
        return stream

    @abstractmethod
    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        """What `layer` makes of the stream; `y` of the output is the new stream."""

    def dropped(self, x: Tensor, context: Context) -> Tensor:
        """`x`, zero for the sequences that skip the layer; sampled once per sequence."""
        if not self.training or not self.drop_path:
            return x
        layout = context.layout
        kept = torch.rand(layout.sequences(x.shape[0]), 1, 1, device=x.device) >= self.drop_path
        if layout.cu_seqlens is not None:
            kept = kept[:, 0, 0].repeat_interleave(layout.lengths(x))[None, :, None]
        return x * (kept.to(x.dtype) / (1 - self.drop_path))


RESIDUALS: Registry[Residual] = Registry("residual form", base=ResidualConfig)
register_residual = RESIDUALS.register
