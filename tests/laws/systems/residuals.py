"""Residual forms."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, ResidualConfig
from omnimix.backbones.residual.hyper import HyperConfig
from omnimix.backbones.residual.norms import PostConfig, PreConfig, ResPostConfig, SandwichConfig

from . import System


def _with(residual: ResidualConfig, *checks) -> System:
    config = BackboneConfig(dim=16, depth=2, pattern=("gla", "attention"), residual=residual)
    return System(config=config, checks=checks)


def starts_as_a_plain_stream(net: Backbone) -> None:
    torch.manual_seed(0)
    copies = Backbone(net.config).double()
    torch.manual_seed(0)
    plain = Backbone(BackboneConfig(dim=16, depth=2, pattern=("gla", "attention"))).double()
    own = plain.state_dict()
    plain.load_state_dict({name: copies.state_dict()[name] for name in own})
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    context = SYSTEMS["layer_scale"].context(x)
    # Every layer reads one copy and writes to all, so that the copies stay equal and their sum is n times one of them;
    # the last norm does not see the factor.
    assert torch.allclose(copies(x, context).y, plain(x, context).y, atol=1e-4)


SYSTEMS = {
    "layer_scale": _with(PreConfig(layer_scale=0.1)),
    "post_norm": _with(PostConfig(alpha=1.3)),
    "res_post_norm": _with(ResPostConfig()),
    "sandwich_norm": _with(SandwichConfig(layer_scale=0.5, multiplier=0.7)),
    "hyper_connections": _with(HyperConfig(rate=3), starts_as_a_plain_stream),
    "static_hyper_connections": _with(HyperConfig(rate=2, dynamic=False)),
}
