"""What every registered classifier is held to, whatever its modality, in each of its examples."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

from omnimix.backbones import from_dict, to_dict
from omnimix.backbones.parameters import no_weight_decay
from omnimix.errors import OmnimixError
from omnimix.modalities import build_model, load_model, save_model
from omnimix.modalities.common.classifier import Classifier
from omnimix.modalities.models import list_classes

CLASSES = [cls for cls in list_classes() if issubclass(cls, Classifier)]
EXAMPLES = [(cls, i) for cls in CLASSES for i in range(len(cls.examples()))]
every_example = pytest.mark.parametrize(("cls", "number"), EXAMPLES, ids=[f"{c.__name__}-{i}" for c, i in EXAMPLES])


def converted(media, dtype):
    return media.to(dtype) if isinstance(media, torch.Tensor) else [part.to(dtype) for part in media]


def example(cls, number, dtype=torch.float64):
    """A model whose parameters are all away from where they start, and what it is given."""
    torch.manual_seed(0)
    config, batches = cls.examples()[number]
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, [converted(media, dtype) for media in batches]


def test_every_modality_is_here():
    assert {"ImageClassifier", "VideoClassifier", "AudioClassifier"} <= {cls.__name__ for cls in CLASSES}


@every_example
def test_a_sample_does_not_depend_on_its_batch(cls, number):
    model, batches = example(cls, number)
    model.eval()
    assert any(len(media) > 1 for media in batches)
    for media in batches:
        together = model(media)
        assert together.shape == (len(media), model.config.head.classes)
        alone = torch.cat([model(media[i : i + 1]) for i in range(len(media))])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
        assert torch.equal(together, model(media))


@every_example
def test_samples_of_several_sizes_differ(cls, number):
    """The logits depend on what was given, in every batch."""
    model, batches = example(cls, number)
    model.eval()
    for media in batches:
        logits = model(media)
        assert logits.isfinite().all() and (logits[0] - logits[1]).abs().max() > 1e-6


@every_example
def test_a_gradient_reaches_every_parameter(cls, number, without_gradient):
    model, batches = example(cls, number)
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64)

    def loss(model):
        return sum((model(media) * weights[: model.config.head.classes]).sum() for media in batches)

    assert without_gradient(model, loss) == []


@every_example
def test_features_and_head_make_the_whole(cls, number):
    model, batches = example(cls, number)
    model.eval()
    for media in batches:
        tokens, layout = model.forward_features(media)
        layout.check(tokens)
        assert layout.sequences(tokens.shape[0]) == len(media)
        assert torch.equal(model.forward_head(tokens, layout), model(media))
        logits, losses = model.forward_with_losses(media)
        assert torch.equal(logits, model(media)) and losses == {}


@every_example
def test_a_saved_model_is_the_same_model(cls, number, tmp_path):
    model, batches = example(cls, number, torch.float32)
    model.eval()
    assert from_dict(cls.config_class, json.loads(json.dumps(to_dict(model.config)))) == model.config
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is cls
    assert all(torch.equal(model(media), loaded(media)) for media in batches)


@every_example
def test_a_model_can_be_built_without_memory(cls, number):
    config, _ = cls.examples()[number]
    with torch.device("meta"):
        model = build_model(config)
    assert all(p.is_meta for p in model.parameters())
    assert model.to_empty(device="cpu").load_state_dict(build_model(config).state_dict())


@every_example
def test_copies_know_what_must_not_decay(cls, number):
    config, _ = cls.examples()[number]
    model = build_model(config)
    said = no_weight_decay(model)
    with torch.device("meta"):
        moved = build_model(config)
    for copy in (deepcopy(model), moved.to_empty(device="cpu")):
        assert no_weight_decay(copy) == said
    moved.load_state_dict(model.state_dict(), assign=True)
    assert no_weight_decay(moved) == said


@every_example
def test_training_steps_lower_the_loss(cls, number):
    model, batches = example(cls, number, torch.float32)
    model.train()
    labels = torch.arange(len(batches[0])) % model.config.head.classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(batches[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@every_example
def test_what_cannot_be_served_is_an_error_of_ours(cls, number, without_shape_checks):
    model, batches = example(cls, number, torch.float32)
    first = batches[0]
    integers = first.long() if isinstance(first, torch.Tensor) else [part.long() for part in first]
    empty = first[..., :0] if isinstance(first, torch.Tensor) else [part[:0] for part in first]
    for wrong in (integers, empty):
        with pytest.raises(OmnimixError):
            model(wrong)
