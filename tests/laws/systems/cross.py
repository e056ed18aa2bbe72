"""Cross-attention to given tokens: an encoder's, and images at places in a text (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, Layout, StageConfig
from omnimix.backbones.mixers.cross_attention import CrossAttentionConfig
from omnimix.backbones.residual.norms import GatedConfig
from omnimix.errors import ConfigError, UnsupportedCall

from . import System, random_memory


def images(sequences: int) -> dict[str, Any]:
    # One image before the text and one at token 4, with an empty slot between.
    return {"shared": {"image": random_memory(sequences, 5, 6, positions=[0, 0, -1, 4, 4])}}


def an_image_is_seen_from_its_place_on(net: Backbone) -> None:
    system = SYSTEMS["flamingo"]
    x = system.tokens(1)
    context = system.context(x)
    image = context.shared["image"]
    before = net(x, context).y
    moved = image._replace(tensors={"x": image.tensors["x"] + torch.tensor([0, 0, 5, 0, 1.0])[:, None]})
    after = net(x, context.replace(shared={"image": moved})).y
    changed = (after - before).abs().amax(-1)[0] > 0
    # The empty slot is seen by nobody.
    assert changed.tolist() == [False] * 4 + [True] * 5


def a_missing_memory_is_named(net: Backbone) -> None:
    with pytest.raises(UnsupportedCall, match="reads 'image'"):
        net(torch.randn(1, 3, 16, dtype=torch.float64), Layout())
    with pytest.raises(ConfigError, match=r"blocks.1 reads 'image'.*BackboneConfig.inputs"):
        Backbone(BackboneConfig(**{**vars(net.config), "inputs": ()}))


SYSTEMS = {
    "flamingo": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=(
                "gla",
                BlockConfig(
                    mixer=CrossAttentionConfig(source="image", heads=2, source_dim=6),
                    ffn="mlp",
                    residual=GatedConfig(gate=0.3),
                ),
            ),
            inputs=("image",),
        ),
        given=images,
        checks=(an_image_is_seen_from_its_place_on, a_missing_memory_is_named),
    ),
    # The decoder of an encoder-decoder model: every slot stands at position 0 and is seen from the start.
    "encoder_decoder": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=(
                "attention/none",
                BlockConfig(mixer=CrossAttentionConfig(source="encoder", heads=4, kv_heads=2), ffn="swiglu"),
            ),
            inputs=("encoder",),
        ),
        given=lambda sequences: {"shared": {"encoder": random_memory(sequences, 4, 16)}},
    ),
    # Each token attends to what an earlier stage made of it and of those before it.
    "earlier_stage": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            ffn=None,
            stages=(
                StageConfig(dim=16, depth=1, pattern=("gla",)),
                StageConfig(
                    dim=16,
                    depth=1,
                    pattern=(BlockConfig(mixer=CrossAttentionConfig(source="stages.0", heads=2, rope=True)),),
                ),
            ),
        )
    ),
}
