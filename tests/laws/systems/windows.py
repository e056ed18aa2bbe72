"""Windows, rows and places over time as sequences, by `fold`."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.backbones.wrappers.fold import FoldConfig

from . import System

ATTENTION = AttentionConfig(heads=2, rope=False)


def nothing_crosses_a_window(net: Backbone) -> None:
    x = torch.randn(1, 30, 16, dtype=torch.float64, requires_grad=True)
    first = net.blocks[0](x, SYSTEMS["windows"].context(x)).y.view(1, 5, 6, 16)
    (g,) = torch.autograd.grad(first[:, :2, :3].square().sum(), x)
    reached = g.view(5, 6, 16).abs().amax(-1) > 0
    assert reached[:2, :3].all() and reached.sum() == 6


SYSTEMS = {
    # Swin (arXiv 2103.14030): windows, then windows that are shifted; sides that are no multiples of a window's.
    "windows": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=(
                BlockConfig(mixer=FoldConfig(inner=ATTENTION, window=(2, 3))),
                BlockConfig(mixer=FoldConfig(inner=ATTENTION, window=(2, 3), shift=(1, 2))),
            ),
        ),
        grids=((1, 5, 6), (1, 4, 3)),
        checks=(nothing_crosses_a_window,),
    ),
    # Axial attention (arXiv 1912.12180) and TimeSformer (arXiv 2102.05095), with a scanning mixer among them.
    "axial": System(
        config=BackboneConfig(
            dim=16,
            depth=4,
            pattern=tuple(
                BlockConfig(mixer=FoldConfig(inner=inner, groups=groups))
                for groups, inner in (
                    ("rows", ATTENTION),
                    ("columns", GLAConfig(heads=2)),
                    ("time", ATTENTION),
                    ("frames", ATTENTION),
                )
            ),
            scan="bidirectional",
        ),
        grids=((3, 2, 4), (2, 3, 1)),
    ),
}
