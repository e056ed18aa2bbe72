"""Residual forms that differ in where they normalise: pre-norm, and none at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import ResidualConfig, Site
from ..context import Context
from ..layer import Output, SequenceLayer
from ..norm import RMSNorm
from ..state import State
from .base import Residual, register_residual


@dataclass(frozen=True, kw_only=True)
class PreConfig(ResidualConfig):
    """`pre` has no options."""


@register_residual(
    "pre",
    PreConfig,
    summary="x + f(norm(x))",
    source="arXiv 2002.04745",
    examples=(PreConfig(),),
)
class Pre(Residual):
    """x + drop(f(norm(x)))."""

    def __init__(self, dim: int, config: ResidualConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        self.norm = RMSNorm(dim, eps=site.norm_eps)

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        out = layer(self.norm(stream), context, state)
        return out._replace(y=stream + self.dropped(out.y, context))


@dataclass(frozen=True, kw_only=True)
class NoneConfig(ResidualConfig):
    """`none` has no options."""


@register_residual(
    "none",
    NoneConfig,
    summary="f(x): the layer alone, which adds to the stream itself where it does",
    source="arXiv 1706.03762",
    examples=(NoneConfig(),),
)
class Alone(Residual):
    """f(x), without normalisation."""

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        return layer(stream, context, state)
