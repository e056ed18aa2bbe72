"""Layers side by side under one norm (PaLM, arXiv 2204.02311; Falcon-H1, arXiv 2507.22448)."""

from __future__ import annotations

from omnimix.backbones import BackboneConfig, BlockConfig
from omnimix.backbones.ffn.mlp import SwiGLUConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.mamba2 import Mamba2Config
from omnimix.backbones.wrappers.parallel import ParallelConfig

from . import System

ATTENTION = AttentionConfig(heads=2)

SYSTEMS = {
    "palm": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=[
                BlockConfig(mixer=ParallelConfig(parts=(ATTENTION, SwiGLUConfig(ratio=2.0)), fuse="sum"), ffn=None)
            ],
        )
    ),
    "falcon_h1": System(
        config=BackboneConfig(
            dim=16,
            depth=1,
            pattern=[
                BlockConfig(
                    mixer=ParallelConfig(
                        parts=(ATTENTION, Mamba2Config(heads=2, state_size=4)), fuse="sum", scales=(0.5, 1.5)
                    )
                )
            ],
        )
    ),
}
