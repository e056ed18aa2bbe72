"""Residual forms."""

from __future__ import annotations

from omnimix.backbones import BackboneConfig, ResidualConfig
from omnimix.backbones.residual.norms import PostConfig, PreConfig, ResPostConfig, SandwichConfig

from . import System


def _with(residual: ResidualConfig) -> System:
    config = BackboneConfig(dim=16, depth=3, pattern=("gla", "attention"), residual=residual)
    return System(config=config)


SYSTEMS = {
    "layer_scale": _with(PreConfig(layer_scale=0.1)),
    "post_norm": _with(PostConfig(alpha=1.3)),
    "res_post_norm": _with(ResPostConfig()),
    "sandwich_norm": _with(SandwichConfig(layer_scale=0.5, multiplier=0.7)),
}
