"""Decoding where something is wrong or shared: models whose numbers are none, and calls from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omnimix import LanguageModel, LanguageModelConfig
from omnimix.backbones import BackboneConfig
from omnimix.backbones.decoding import DiffusionConfig, GenerationConfig, diffuse, generate, speculate, stream
from omnimix.backbones.decoding.prefill import evaluating
from omnimix.errors import NotFinite

from .writers import PROMPTS, tiny


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: generate(model, PROMPTS, GenerationConfig(max_new_tokens=2)),
        lambda model: generate(model, PROMPTS, GenerationConfig(max_new_tokens=2, temperature=1.0, top_k=3, top_p=0.9)),
        lambda model: generate(model, PROMPTS, GenerationConfig(max_new_tokens=2, num_beams=2)),
        lambda model: list(stream(model, PROMPTS[0], GenerationConfig(max_new_tokens=2))),
        lambda model: speculate(model, tiny(["gla"]), PROMPTS, GenerationConfig(max_new_tokens=2)),
        lambda model: speculate(tiny(["gla"]), model, PROMPTS, GenerationConfig(max_new_tokens=2)),
    ],
    ids=["greedy", "sampled", "beams", "stream", "speculate", "draft"],
)
def test_nothing_is_generated_from_logits_that_are_not_finite(call, value):
    model = tiny(["gla"])
    with torch.no_grad():
        # Of the two logits one is infinite, whatever the sign of what they multiply.
        model.head.weight[2, 3], model.head.weight[4, 3] = value, -value
    with pytest.raises(NotFinite, match="weights"):
        call(model)


def test_nothing_is_denoised_from_logits_that_are_not_finite():
    backbone = BackboneConfig(dim=16, depth=1, pattern=["attention"])
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=9, objective="masked"))
    with torch.no_grad():
        model.embedding.weight[2, 3] = torch.nan
    with pytest.raises(NotFinite, match="weights"):
        diffuse(model, [[2, 1]], DiffusionConfig(max_new_tokens=3))


def test_a_token_that_is_ruled_out_by_the_model_is_no_fault():
    model = tiny(["gla"])
    whole = model.logits
    model.logits = lambda y: whole(y).index_fill(-1, torch.tensor([1]), -torch.inf)
    assert all(1 not in tokens for tokens in generate(model, PROMPTS, GenerationConfig(max_new_tokens=3)).tokens)


def test_the_first_to_finish_leaves_the_others_in_evaluation_mode():
    model = tiny(["gla"]).train()
    model.head.eval()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(m.training for m in model.modules())
    second.__exit__(None, None, None)
    assert [m for m in model.modules() if not m.training] == [model.head]


def test_models_that_share_a_module_hold_it_together():
    one, other = torch.nn.Sequential(torch.nn.Dropout()), torch.nn.Sequential(torch.nn.Dropout())
    other[0] = one[0]
    first, second = evaluating(one), evaluating(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert one.training and not other[0].training
    second.__exit__(None, None, None)
    assert other.training and other[0].training


def test_threads_generate_what_one_does_from_a_model_in_training_mode():
    model = tiny(["gated_deltanet"]).train()
    model.backbone.blocks[0].add_module("noise", torch.nn.Dropout(0.9))
    model.backbone.register_forward_pre_hook(lambda m, args: (m.blocks[0].noise(args[0]), *args[1:]))
    configs = [GenerationConfig(max_new_tokens=n) for n in (1, 12, 2, 9, 3, 12)]
    alone = [generate(model, PROMPTS, config).tokens for config in configs]
    with ThreadPoolExecutor(len(configs)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda config: generate(model, PROMPTS, config).tokens, configs)) == alone
    assert all(m.training for m in model.modules())
