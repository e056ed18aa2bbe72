"""Residual forms that differ in where they normalise and how they scale what they add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ResidualConfig, Site, bounded, positive
from ..context import Context
from ..layer import Output, SequenceLayer
from ..norm import RMSNorm
from ..parameters import mark
from ..state import State
from .base import Residual, register_residual


@dataclass(frozen=True, kw_only=True)
class PreConfig(ResidualConfig):
    """Options of `pre`, and of the other forms that differ from it in where they normalise.

    Args:
        layer_scale: initial value of a learned factor per channel on what is added (LayerScale, arXiv 2103.17239); None
            for no such factor.
        multiplier: constant factor on what is added (Granite, MiniCPM).
    """

    layer_scale: float | None = None
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "layer_scale", "multiplier")


@register_residual(
    "pre",
    PreConfig,
    summary="x + f(norm(x))",
    source="arXiv 2002.04745",
    examples=(PreConfig(), PreConfig(layer_scale=0.5, multiplier=0.22)),
)
class Pre(Residual):
    """x + γ ⊙ f(norm(x))."""

    before, after = True, False

    def __init__(self, dim: int, config: PreConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        self.multiplier = config.multiplier
        if self.before:
            self.norm = RMSNorm(dim, eps=site.norm_eps)
        if self.after:
            self.norm_after = RMSNorm(dim, eps=site.norm_eps)
        scale = config.layer_scale
        self.layer_scale = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        mark(self, "layer_scale", decay=False)

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        out = layer(self.norm(stream) if self.before else stream, context, state)
        return out._replace(y=self.join(stream, self.scaled(out.y), context))

    def scaled(self, y: Tensor) -> Tensor:
        """What the layer made, as it is added."""
        y = self.norm_after(y) if self.after else y
        y = y if self.multiplier == 1 else y * self.multiplier
        return y if self.layer_scale is None else y * self.layer_scale.to(y.dtype)

    def join(self, stream: Tensor, y: Tensor, context: Context) -> Tensor:
        """The new stream."""
        return stream + self.dropped(y, context)


@dataclass(frozen=True, kw_only=True)
class ResPostConfig(PreConfig):
    """Options of `res_post`; see `PreConfig`."""


@register_residual(
    "res_post",
    ResPostConfig,
    summary="x + norm(f(x)), as in OLMo 2 and Swin-V2",
    source="arXiv 2111.09883, 2501.00656",
    examples=(ResPostConfig(),),
)
class ResPost(Pre):
    """x + γ ⊙ norm(f(x))."""

    before, after = False, True


@dataclass(frozen=True, kw_only=True)
class SandwichConfig(PreConfig):
    """Options of `sandwich`; see `PreConfig`."""


@register_residual(
    "sandwich",
    SandwichConfig,
    summary="x + norm(f(norm(x))), as in Gemma 2",
    source="arXiv 2105.13290, 2408.00118",
    examples=(SandwichConfig(layer_scale=0.1),),
)
class Sandwich(Pre):
    """x + γ ⊙ norm(f(norm(x)))."""

    before, after = True, True


@dataclass(frozen=True, kw_only=True)
class PostConfig(PreConfig):
    """Options of `post`; see `PreConfig`.

    Args:
        alpha: factor on the stream before the sum (DeepNorm, arXiv 2203.00555).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "alpha")


@register_residual(
    "post",
    PostConfig,
    summary="norm(x + f(x)), the original Transformer and BERT",
    source="arXiv 1706.03762",
    examples=(PostConfig(), PostConfig(alpha=1.7)),
)
class Post(Pre):
    """norm(α x + γ ⊙ f(x))."""

    before, after = False, False

    def __init__(self, dim: int, config: PostConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        self.alpha = config.alpha
        self.norm = RMSNorm(dim, eps=site.norm_eps)

    def join(self, stream: Tensor, y: Tensor, context: Context) -> Tensor:
        stream = stream if self.alpha == 1 else stream * self.alpha
        return self.norm(super().join(stream, y, context))


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PreConfig):
    """Options of `gated`; see `PreConfig`.

    Args:
        gate: initial value of the gate's argument; 0 leaves the stream as it is.
    """

    gate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, "gate")


@register_residual(
    "gated",
    GatedConfig,
    summary="x + tanh(g) f(norm(x)) with a learned scalar g, as in Flamingo",
    source="arXiv 2204.14198",
    examples=(GatedConfig(gate=0.5),),
)
class Gated(Pre):
    """x + tanh(g) f(norm(x))."""

    def __init__(self, dim: int, config: GatedConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        # FSDP2 cannot shard a parameter without dimensions.
        self.gate = nn.Parameter(torch.full((1,), config.gate))
        mark(self, "gate", decay=False)

    def scaled(self, y: Tensor) -> Tensor:
        return super().scaled(y) * self.gate.tanh().to(y.dtype)


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

    drops = False

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        return layer(stream, context, state)
