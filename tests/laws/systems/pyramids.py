"""Stages of different width and resolution: a four-stage pyramid, and U-shaped backbones with long skips."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, StageConfig
from omnimix.backbones.transition.merge import MergeConfig
from omnimix.backbones.transition.skip import SkipConfig

from . import System

GRIDS = ((1, 9, 6), (1, 4, 5), (2, 8, 8))


def stages_halve_the_grid(net: Backbone) -> None:
    x = torch.randn(2, 54, 8, dtype=torch.float64)
    taps = tuple(f"stages.{i}" for i in range(4))
    out = net(x, SYSTEMS["pyramid"].context(x), taps=taps)
    found = [out.shared[name] for name in taps]
    assert [m.layout.grid for m in found] == [(1, 9, 6), (1, 5, 3), (1, 3, 2), (1, 2, 1)]
    assert [m.tensors["x"].shape[-1] for m in found] == [8, 12, 16, 24]
    assert out.context.layout.grid == (1, 2, 1) and torch.equal(out.y, net.norm(found[-1].tensors["x"]))


def the_skip_carries_detail(net: Backbone) -> None:
    x = torch.randn(1, 54, 8, dtype=torch.float64)
    out = net(x, SYSTEMS["unet"].context(x))
    assert out.y.shape == x.shape and out.context.layout.grid == (1, 9, 6)


SYSTEMS = {
    # Swin (arXiv 2103.14030) and VMamba (arXiv 2401.10166).
    "pyramid": System(
        config=BackboneConfig(
            dim=8,
            depth=4,
            pattern=("gla", "attention"),
            scan="cross",
            stages=(
                StageConfig(dim=8, depth=1),
                StageConfig(dim=12, depth=1, transition=MergeConfig()),
                StageConfig(dim=16, depth=1, pattern=("attention",), transition="merge"),
                StageConfig(dim=24, depth=1, transition="merge"),
            ),
        ),
        grids=GRIDS,
        checks=(stages_halve_the_grid,),
    ),
    # VM-UNet (arXiv 2402.02491).
    "unet": System(
        config=BackboneConfig(
            dim=8,
            depth=3,
            pattern=("mamba",),
            scan="bidirectional",
            ffn=None,
            stages=(
                StageConfig(dim=8, depth=1),
                StageConfig(dim=12, depth=1, transition="merge"),
                StageConfig(dim=8, depth=1, transition=SkipConfig(source="stages.0", source_dim=8, expand=True)),
            ),
        ),
        grids=GRIDS,
        checks=(the_skip_carries_detail,),
    ),
    # U-ViT (arXiv 2209.12152), which may as well be causal.
    "long_skip": System(
        config=BackboneConfig(
            dim=16,
            depth=3,
            pattern=("gla", "attention"),
            stages=(
                StageConfig(dim=16, depth=1),
                StageConfig(dim=16, depth=1),
                StageConfig(dim=16, depth=1, transition=SkipConfig(source="stages.0")),
            ),
        )
    ),
}
