"""Patterns whose entries differ: dense before experts, one layer without the other, windows and bases of their own."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig
from omnimix.backbones.ffn.mlp import SwiGLUConfig
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.mamba2 import Mamba2Config
from omnimix.backbones.mixers.window import WindowConfig

from . import System

MAMBA2 = Mamba2Config(heads=2, state_size=4)
ATTENTION = AttentionConfig(heads=2, kv_heads=1)
EXPERTS = MoEConfig(experts=3, active=2, ratio=0.5)


def dense_before_experts(net: Backbone) -> None:
    assert [type(block.ffn).__name__ for block in net.blocks] == ["SwiGLU", "MoE", "SwiGLU", "MoE"]
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    assert set(net(x, SYSTEMS["jamba"].context(x)).losses) == {"load_balance", "router_z"}


def windows_and_bases_differ(net: Backbone) -> None:
    near, far = (block.mixer for block in net.blocks)
    assert (near.window, near.rope_base, far.window, far.rope_base) == (3, 10_000.0, None, 1_000_000.0)


SYSTEMS = {
    # Jamba (arXiv 2403.19887) and DeepSeek (arXiv 2401.06066): dense first, then experts in every second layer.
    "jamba": System(
        config=BackboneConfig(
            dim=16,
            depth=4,
            pattern=(
                BlockConfig(mixer=MAMBA2, ffn=SwiGLUConfig(ratio=2.0)),
                BlockConfig(mixer=ATTENTION, ffn=EXPERTS),
            ),
        ),
        checks=(dense_before_experts,),
    ),
    # Nemotron-H (arXiv 2504.03624): layers with a mixer or a feed-forward layer only.
    "nemotron_h": System(
        config=BackboneConfig(
            dim=16,
            depth=4,
            pattern=("mamba2/none", "none/mlp", "attention/none", "none/mlp"),
            mixers={"mamba2": MAMBA2, "attention": ATTENTION},
        )
    ),
    # Gemma 3 (arXiv 2503.19786): local and global layers with bases of their own.
    "gemma": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=(
                BlockConfig(mixer=WindowConfig(heads=2, window=3)),
                BlockConfig(mixer=AttentionConfig(heads=2, rope_base=1_000_000.0)),
            ),
            residual="sandwich",
        ),
        checks=(windows_and_bases_differ,),
    ),
}
