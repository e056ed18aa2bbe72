"""Mixture-of-depths (arXiv 2404.02258)."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, Layout
from omnimix.backbones.ffn.mlp import SwiGLUConfig
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig

from . import System

INNER = BlockConfig(mixer=GLAConfig(heads=2), ffn=SwiGLUConfig(ratio=2.0))
CONFIG = BackboneConfig(
    dim=16,
    depth=2,
    pattern=(
        "attention",
        BlockConfig(mixer=MixtureOfDepthsConfig(block=INNER, capacity=0.5), ffn=None, residual="none"),
    ),
)


def tokens_that_are_not_chosen_stay(net: Backbone) -> None:
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    layer = net.blocks[1]
    for training, context in ((True, Layout()), (False, Layout())):
        layer.train(training)
        changed = (layer(x, context).y != x).any(-1)
        wanted = 5 if training else (layer.mixer.predictor(x)[..., 0] > 0).sum(1)
        assert (changed.sum(1) == wanted).all()
    packed = Layout(cu_seqlens=torch.tensor([0, 10, 20]))
    layer.train()
    rows = layer(x, Layout()).y
    assert torch.allclose(layer(x.view(1, 20, 16), packed).y.view(2, 10, 16), rows, atol=1e-12)


SYSTEMS = {
    "mixture_of_depths": System(config=CONFIG, compiles=False, checks=(tokens_that_are_not_chosen_stay,)),
    "mixture_of_depths_in_training": System(config=CONFIG, train=True),
}
