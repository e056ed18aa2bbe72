"""RWKV-7: values mixed with the first layer's, and channel mixing that sees the token before (arXiv 2503.14456)."""

from __future__ import annotations

import dataclasses

import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, Context, Layout, StageConfig
from omnimix.backbones.ffn.rwkv import RWKVConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.rwkv7 import RWKV7Config
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig

from . import System


def _gates(net: Backbone, value: float) -> None:
    """Fixes by how much later layers take over the first one's values."""
    for branch in (branch for block in net.blocks[1:] for branch in block.mixer.branches):
        torch.nn.init.zeros_(branch.value.up.weight)
        torch.nn.init.constant_(branch.value.bias, value)


def values_are_the_first_layers_or_ones_own(net: Backbone) -> None:
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    grid = None if net.capabilities.causal else (1, 2, 3)
    context = Context(Layout(causal=net.capabilities.causal, grid=grid))
    _gates(net, -1e4)
    alone = Backbone(dataclasses.replace(net.config, pattern=(_rwkv7(value_residual=False),))).double()
    alone.load_state_dict({n: w for n, w in net.state_dict().items() if ".value." not in n})
    assert torch.allclose(net(x, context).y, alone(x, context).y, atol=1e-12)
    _gates(net, 1e4)
    before = net(x, context).y
    for branch in (branch for block in net.blocks[1:] for branch in block.mixer.branches):
        torch.nn.init.zeros_(branch.v_proj.weight)
    assert torch.equal(net(x, context).y, before)


def _rwkv7(**options: object) -> BlockConfig:
    ranks = {"decay_rank": 3, "rate_rank": 3, "gate_rank": 3, "value_rank": 2}
    return BlockConfig(mixer=RWKV7Config(heads=2, **ranks, **options), ffn=RWKVConfig(ratio=2.0))


def _value_residual(scan: str) -> System:
    config = BackboneConfig(dim=16, depth=2, pattern=(_rwkv7(),), scan=scan)
    return System(config=config, grids=((1, 2, 3),) * 2 if scan != "forward" else (), checks=CHECKS)


CHECKS = (values_are_the_first_layers_or_ones_own,)
SYSTEMS = {
    "rwkv7": _value_residual("forward"),
    "rwkv7_cross": _value_residual("cross"),
    # What chosen tokens, another width or another direction have is not read.
    "rwkv7_pyramid": System(
        config=BackboneConfig(
            dim=16,
            depth=4,
            pattern=(_rwkv7(),),
            scan="bidirectional",
            stages=(
                StageConfig(dim=16, depth=2),
                StageConfig(dim=8, depth=2, transition="merge"),
            ),
        ),
        grids=((1, 3, 2), (2, 2, 2)),
    ),
    "rwkv7_depths": System(
        config=BackboneConfig(
            dim=16,
            depth=3,
            pattern=(
                BlockConfig(mixer=MixtureOfDepthsConfig(block=_rwkv7()), ffn=None, residual="none"),
                _rwkv7(),
            ),
        ),
        compiles=False,
    ),
    "rwkv7_tied": System(
        config=BackboneConfig(dim=16, depth=3, pattern=(dataclasses.replace(_rwkv7(), tie="shared"),))
    ),
    "rwkv_channel_mixing": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=(
                BlockConfig(mixer=AttentionConfig(heads=2), ffn=RWKVConfig(ratio=2.0)),
                BlockConfig(mixer=None, ffn=RWKVConfig(ratio=1.5)),
            ),
        )
    ),
}
