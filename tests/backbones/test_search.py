"""Beam search and speculative decoding: what an exhaustive search and the large model alone would write."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from omnimix.backbones.decoding import GenerationConfig, SpeculationConfig, generate, speculate
from omnimix.backbones.decoding.beam import search
from omnimix.backbones.decoding.sampling import draw, generator
from omnimix.backbones.decoding.speculative import _Text
from omnimix.errors import ConfigError, UnsupportedCall

from .writers import END, PROMPTS, far, tiny

# Beams


def test_one_beam_is_greedy():
    model = tiny(["gla", "attention"])
    config = GenerationConfig(max_new_tokens=8, end=END)
    found, wanted = search(model, PROMPTS, config, None), generate(model, PROMPTS, config)
    assert found.tokens == wanted.tokens and found.reasons == wanted.reasons
    assert all(map(lambda a, b: far(a, b) < 1e-9, found.log_probs, wanted.log_probs))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_are_an_exhaustive_search(penalty):
    model = tiny(["gated_deltanet", "attention"], vocab_size=5)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    prompts, length, end = [[1, 2, 4], [0]], 4, 3
    config = GenerationConfig(max_new_tokens=length, num_beams=5 ** (length - 1), length_penalty=penalty, end=end)
    found = generate(model, prompts, config)
    for prompt, tokens, score in zip(prompts, found.tokens, found.scores, strict=True):
        texts = [list(t) for t in itertools.product(range(5), repeat=length)]
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + t for t in texts]))
        log_probs = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        scores = {}
        for row, text in zip(log_probs, texts, strict=True):
            cut = text[: text.index(end) + 1] if end in text else text
            scores[tuple(cut)] = float(sum(row[i, t] for i, t in enumerate(cut))) / len(cut) ** penalty
        best = max(scores, key=scores.get)
        assert tuple(tokens) == best and abs(score - scores[best]) < 1e-9


def test_beams_of_a_batch_are_each_alone():
    model = tiny(["mamba2", "attention"])
    config = GenerationConfig(max_new_tokens=9, num_beams=3, end=END, chunk=2)
    together = generate(model, PROMPTS, config)
    assert together.tokens == [generate(model, [p], config).tokens[0] for p in PROMPTS]
    greedy = generate(model, PROMPTS, GenerationConfig(max_new_tokens=9, end=END))
    assert together.tokens != greedy.tokens


# Speculation


def test_greedy_speculation_is_greedy(without_shape_checks):
    model = tiny(["gated_deltanet", "attention"])
    near = copy.deepcopy(model)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    prompts = PROMPTS[:2]
    config = GenerationConfig(max_new_tokens=14, end=END, repetition_penalty=1.3)
    wanted = generate(model, prompts, config)
    for draft, again in ((model, 8), (near, 8), (tiny(["gla"], seed=1), 2)):
        found = speculate(model, draft, prompts, config, SpeculationConfig(num_assistant_tokens=3, again=again))
        assert found.generation.tokens == wanted.tokens
        assert found.generation.reasons == wanted.reasons
        assert all(map(lambda a, b: far(a, b) < 1e-9, found.generation.log_probs, wanted.log_probs))
        if draft is model:
            assert found.acceptance > 0.9 and found.calls < wanted.new_tokens / 2
        if draft is near:
            assert 0.1 < found.acceptance < 1


def test_proposals_are_taken_as_the_model_would_choose():
    """Whatever is proposed, what is taken has the wanted distribution (arXiv 2211.17192, appendix A.1)."""
    model = tiny(["gla"], vocab_size=4)
    wanted = torch.tensor([[0.5, 0.0, 0.2, 0.3]], dtype=torch.float64)
    guess = torch.tensor([[0.1, 0.3, 0.2, 0.4]], dtype=torch.float64)
    text, n = _Text(model, model, [1], GenerationConfig(temperature=1.0), 0), 4000
    proposals = draw(guess.expand(n, -1), [generator(0, 1)] * n).tolist()
    taken = torch.tensor([text._take(proposal, wanted, guess) for proposal in proposals])
    error = (wanted[0] * (1 - wanted[0]) / n).sqrt()
    assert ((taken.bincount(minlength=4) / n - wanted[0]).abs() <= 3 * error).all()
    same = (taken == torch.tensor(proposals)).double().mean()
    assert abs(float(same) - float(torch.minimum(wanted, guess).sum())) < 3 * math.sqrt(0.25 / n)


def test_sampled_speculation_has_the_models_distribution(without_shape_checks):
    model, draft = (tiny(["gla"], seed=seed, vocab_size=2) for seed in (0, 1))
    with torch.no_grad():
        model.head.weight.mul_(0.2)
        draft.head.weight.mul_(0.2)
    n, length = 100, 2
    texts = [list(t) for t in itertools.product(range(2), repeat=length)]
    with torch.no_grad():
        logits, _ = model(torch.tensor([[1, *t] for t in texts]))
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, torch.tensor(texts)[..., None]).sum((1, 2))
    config = GenerationConfig(max_new_tokens=length, temperature=1.0)
    found = speculate(model, draft, [[1]] * n, config, SpeculationConfig(num_assistant_tokens=2))
    assert 0 < found.acceptance < 1
    counts = torch.tensor([found.generation.tokens.count(t) for t in texts])
    share = log_probs.exp()
    assert ((counts / n - share).abs() <= 3 * (share * (1 - share) / n).sqrt()).all()


def test_speculation_refuses_what_does_not_fit():
    model = tiny(["gla"])
    with pytest.raises(UnsupportedCall, match="vocabulary of 5"):
        speculate(model, tiny(["gla"], vocab_size=5), [[1]])
    with pytest.raises(UnsupportedCall, match="num_beams=1"):
        speculate(model, model, [[1]], GenerationConfig(num_beams=2))
    with pytest.raises(ConfigError, match="num_assistant_tokens"):
        SpeculationConfig(num_assistant_tokens=0)
