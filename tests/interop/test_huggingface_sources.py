"""What `to_pretrained` takes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import omnimix as om
from omnimix.errors import UnsupportedCall
from omnimix.modalities import ByteTokenizer


def test_to_pretrained_takes_a_text_generator_and_refuses_a_backbone():
    backbone = om.BackboneConfig(dim=8, depth=1)
    tokenizer = ByteTokenizer()
    model = om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=tokenizer.vocab_size))
    found = om.huggingface.to_pretrained(om.TextGenerator(model, tokenizer))
    assert found.config.eos_token_id == tokenizer.end
    with pytest.raises(UnsupportedCall, match="model is a Backbone"):
        om.huggingface.to_pretrained(om.Backbone(backbone))
