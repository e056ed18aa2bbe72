"""RWKV-7: values mixed with the first layer's, and channel mixing that sees the token before (arXiv 2503.14456)."""

from __future__ import annotations

from omnimix.backbones import BackboneConfig, BlockConfig
from omnimix.backbones.ffn.rwkv import RWKVConfig
from omnimix.backbones.mixers.attention import AttentionConfig

from . import System

SYSTEMS = {
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
