"""What parameters are marked with outlives whatever puts new parameters into their places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import omnimix as om
from omnimix.backbones import BlockConfig, list_mixers, no_weight_decay
from omnimix.backbones.mixers import get_mixer


def language_model(mixer: str, **options) -> om.LanguageModel:
    torch.manual_seed(0)
    pattern = (BlockConfig(mixer=get_mixer(mixer).examples[0], tie="all"),)
    backbone = om.BackboneConfig(dim=48, depth=2, pattern=pattern, residual="gated", **options)
    return om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=11)).eval()


@pytest.fixture
def empty_weights(monkeypatch):
    """As accelerate's `init_empty_weights`: what is registered is made anew on the device "meta"."""
    register = nn.Module.register_parameter

    def registered(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            own = module._parameters[name]
            made = type(own)(own.to("meta"), **own.__dict__, requires_grad=own.requires_grad)
            module._parameters[name] = made

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", registered)
        yield patched


@pytest.mark.parametrize("mixer", list_mixers())
def test_models_are_built_empty(mixer, empty_weights):
    shell = language_model(mixer)
    assert all(p.is_meta for p in shell.parameters())
    empty_weights.undo()
    model = language_model(mixer)
    assert no_weight_decay(shell) == no_weight_decay(model)
    assert len(list(shell.parameters())) == len(list(model.parameters()))
    shell.load_state_dict(model.state_dict(), assign=True)
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(shell(ids)[0], model(ids)[0])
    assert shell.head.weight is shell.embedding.weight
    assert no_weight_decay(shell) == no_weight_decay(model) == no_weight_decay(copy.deepcopy(model))


@pytest.mark.parametrize("mixer", ["mamba", "hyena", "rwkv7"])
def test_accelerate_builds_models_empty(mixer):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        shell = language_model(mixer)
    assert all(p.is_meta for p in shell.parameters())
    assert no_weight_decay(shell) == no_weight_decay(language_model(mixer))
