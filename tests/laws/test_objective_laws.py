"""What every registered objective of language models is held to, in each of its example configurations."""

from __future__ import annotations

import pytest
import torch

from omnimix.backbones import BackboneConfig, LanguageModel, LanguageModelConfig, from_dict, to_dict
from omnimix.backbones.heads import get_objective, list_objectives
from omnimix.errors import UnsupportedShape
from omnimix.modalities import load_model, save_model

VOCABULARY = 7
EXAMPLES = [(name, options) for name in list_objectives() for options in get_objective(name).examples]
every_objective = pytest.mark.parametrize(
    ("name", "options"), EXAMPLES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(EXAMPLES)]
)


def model_of(name: str, options) -> LanguageModel:
    # In blocks of one token nothing lies behind: a scan backwards would have gates that move nothing.
    forward = get_objective(name).build.decoder == "autoregressive" or getattr(options, "block", None) == 1
    scan = "forward" if forward else "bidirectional"
    backbone = BackboneConfig(dim=16, depth=2, pattern=("gla", "attention"), scan=scan)
    config = LanguageModelConfig(backbone=backbone, vocab_size=VOCABULARY, objective=options)
    model = LanguageModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def drawn(model: LanguageModel, seed: int = 3, **batch):
    torch.manual_seed(seed)
    return model.loss(**batch)


@every_objective
def test_a_loss_is_repeated_by_its_seed_and_by_a_saved_model(name, options, tmp_path):
    model = model_of(name, options).float()
    tokens = torch.randint(VOCABULARY, (3, 9))
    first = drawn(model, tokens=tokens)
    assert torch.equal(first.loss, drawn(model, tokens=tokens).loss)
    assert first.count == 3 * 8 and not first.nats.requires_grad
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).train()
    assert torch.equal(first.loss, drawn(loaded, tokens=tokens).loss)
    assert from_dict(LanguageModelConfig, to_dict(model.config)) == model.config


@every_objective
def test_a_gradient_reaches_every_parameter(name, options, without_gradient):
    tokens = torch.randint(VOCABULARY, (8, 12))
    assert without_gradient(model_of(name, options), lambda model: drawn(model, tokens=tokens).loss) == []


@every_objective
def test_a_likelihood_does_not_depend_on_the_batch_or_its_padding(name, options):
    model = model_of(name, options).eval()
    tokens, lengths = torch.randint(VOCABULARY, (3, 7)), torch.tensor([7, 4, 2])
    counted = torch.rand(3, 7) < 0.7
    counted[:, 1] = True
    together = model.objective.log_likelihood(model, tokens, lengths=lengths, counted=counted, samples=6, seed=5)
    other = tokens.clone()
    other[1, 4:], other[2, 2:] = 0, 1
    padded = model.objective.log_likelihood(model, other, lengths=lengths, counted=counted, samples=6, seed=5)
    for i, n in enumerate(lengths.tolist()):
        alone = model.objective.log_likelihood(
            model, tokens[i : i + 1, :n], counted=counted[i : i + 1, :n], samples=6, seed=5
        )
        assert alone.nats[0] > 0
        for found in (together, padded):
            torch.testing.assert_close(found.nats[i].double(), alone.nats[0].double(), rtol=1e-9, atol=1e-9)
            assert found.samples == alone.samples and (found.error is None) == (alone.error is None)


@every_objective
def test_the_first_token_is_given_and_nothing_to_predict_is_refused(name, options):
    model = model_of(name, options)
    with pytest.raises(UnsupportedShape, match="none is left"):
        model.loss(torch.randint(VOCABULARY, (2, 1)))
    with pytest.raises(UnsupportedShape, match="none is left"):
        model.loss(torch.randint(VOCABULARY, (2, 5)), counted=torch.zeros(2, 5, dtype=torch.bool))
