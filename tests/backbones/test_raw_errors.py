"""Calls that a newcomer gets wrong are refused with an error of ours, which says what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

import omnimix as om
from omnimix.errors import ConfigError, UnsupportedCall, UnsupportedShape


@pytest.fixture(autouse=True)
def _without_checked_annotations() -> Iterator[None]:
    # In tests the annotations are checked, before our own checks see the arguments; users have these alone.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


CAUSAL = om.Layout(causal=True)


@pytest.fixture(scope="module")
def net() -> om.Backbone:
    return om.Backbone(om.BackboneConfig(dim=8, depth=1, pattern=["gla"])).eval()


@pytest.fixture(scope="module")
def model() -> om.LanguageModel:
    backbone = om.BackboneConfig(dim=8, depth=1, pattern=["gla"])
    return om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=11)).eval()


@pytest.mark.parametrize("context", [(), (True,), (None,)])
def test_backbone_asks_for_a_layout(net, context):
    with pytest.raises(UnsupportedCall, match=r"context is .*Layout\(causal=True\)"):
        net(torch.zeros(1, 2, 8), *context)


def test_backbone_asks_for_a_tensor(net):
    with pytest.raises(UnsupportedShape, match="x is a list"):
        net([1], CAUSAL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_backbone_says_the_dtype_of_its_weights(net, dtype):
    with pytest.raises(UnsupportedShape, match=r"weights are torch.float32; pass x.to\(torch.float32\)"):
        net(torch.zeros(1, 2, 8, dtype=dtype), CAUSAL)


@pytest.mark.parametrize("prompts", [[1, 2], ["ab"], "ab", [[1.5]], torch.tensor([1, 2]), torch.ones(1, 2)])
def test_prompts_are_lists_of_ids(model, prompts):
    with pytest.raises(UnsupportedShape, match="prompts: "):
        om.generate(model, prompts)


def test_options_of_generation_may_be_keywords_or_a_mapping(model):
    wanted = om.generate(model, [[1, 2]], om.GenerationConfig(max_new_tokens=3)).tokens
    assert om.generate(model, [[1, 2]], max_new_tokens=3).tokens == wanted
    assert om.generate(model, [[1, 2]], {"max_new_tokens": 3}).tokens == wanted
    assert om.generate(model, [[1, 2]], om.GenerationConfig(seed=1), max_new_tokens=3).tokens == wanted
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        om.generate(model, [[1, 2]], max_new_token=3)
    with pytest.raises(ConfigError, match="it must be a GenerationConfig"):
        om.generate(model, [[1, 2]], 3)


@pytest.mark.parametrize("tokens", [torch.tensor([1, 2]), torch.ones(1, 2), [[1, 2]]])
def test_loss_asks_for_rows_of_ids(model, tokens):
    with pytest.raises(UnsupportedShape, match="tokens"):
        model.loss(tokens)


@pytest.mark.parametrize("entry", ["gla+", "+gla", "", "gla/"])
def test_pattern_names_what_it_means(entry):
    with pytest.raises(ConfigError, match="a name is missing"):
        om.BackboneConfig(dim=8, depth=1, pattern=[entry])
