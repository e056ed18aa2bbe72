"""Muon beside AdamW, and the schedules."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn

from omnimix.backbones import BackboneConfig, LanguageModel, LanguageModelConfig
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.errors import CheckpointError
from omnimix.recipes.common.optimiser_states import keyed_by_name
from omnimix.recipes.common.optimisers import MuonAdamW, build_optimiser, cosine, hidden_matrices, wsd
from omnimix.recipes.common.training import TrainingConfig


def model() -> LanguageModel:
    backbone = BackboneConfig(dim=16, depth=2, pattern=["mamba2", "attention"], ffn=MoEConfig(experts=2))
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11, tie_word_embeddings=False))


def muon(*parameters: nn.Parameter, **options) -> MuonAdamW:
    options = {"lr": 0.1, "betas": (0.9, 0.95), "momentum": 0.95} | options
    named = [(str(i), p) for i, p in enumerate(parameters)]
    return MuonAdamW([{"params": named, "weight_decay": 0.0}], [], **options)


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_steps_of_muon_are_orthogonal_and_as_large_as_those_of_adamw(shape):
    weight = nn.Parameter(torch.zeros(shape))
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    weight.grad = u @ torch.diag(torch.logspace(0, -1, min(shape))) @ v
    muon(weight).step()
    step = weight.detach() / (-0.1 * 0.2 * max(shape) ** 0.5)
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() and values.max() < 1.3
    # AdamW's root mean square is 0.2 to 0.4 of its rate.
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.25)


def test_muon_serves_hidden_matrices_and_adamw_the_rest():
    net = model()
    matrices = hidden_matrices(net)
    assert {"backbone.blocks.1.mixer.out_proj.weight", "backbone.blocks.0.mixer.in_proj.weight"} <= matrices
    assert all(net.get_parameter(name).ndim == 2 for name in matrices)
    assert not matrices & {"embedding.weight", "head.weight"}
    optimizer = build_optimiser(net, TrainingConfig(optimizer="muon", weight_decay=0.3, lr=0.01))
    names = {id(p): name for name, p in net.named_parameters()}
    served = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(served) == sorted(names.values())
    # Stacked experts are three-dimensional.
    assert any(net.get_parameter(name).ndim == 3 for name in set(served) - matrices)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    moved = {name: (p.detach() - before[name]) / 0.01 for name, p in net.named_parameters()}
    assert all(moved[name].abs().max() > 0 for name in moved)
    for name in moved:
        state = optimizer.state[net.get_parameter(name)]
        assert ("momentum_buffer" in state) == (name in matrices) == ("exp_avg" not in state)
    # The first step of AdamW is the sign of the gradient, beside the decay.
    step = moved["head.weight"] + 0.3 * before["head.weight"]
    torch.testing.assert_close(step, -net.head.weight.grad.sign(), rtol=1e-3, atol=1e-3)


def test_the_state_goes_on_where_it_was_saved():
    torch.manual_seed(1)
    net, config = model(), TrainingConfig(optimizer="muon", lr=0.02)
    gradients = [[torch.randn_like(p) for p in net.parameters()] for _ in range(4)]
    optimizer = build_optimiser(net, config)

    def step(net, optimizer, gradients):
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()

    for some in gradients[:2]:
        step(net, optimizer, some)
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = build_optimiser(other, config)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group["lr"] = 0.5  # as schedules do
    for some in gradients[2:]:
        step(net, optimizer, some)
        step(other, resumed, some)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_is_matched_by_name_not_by_order(kind):
    class Turned(nn.Module):
        """The same layers, registered from the last to the first."""

        def __init__(self, net):
            super().__init__()
            for name, child in reversed(list(net.named_children())):
                self.add_module(name, child)

    net, config = model(), TrainingConfig(optimizer=kind)
    optimizer = build_optimiser(net, config)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    turned = Turned(deepcopy(net))
    assert [n for n, _ in turned.named_parameters()] != [n for n, _ in net.named_parameters()]
    resumed = build_optimiser(turned, config)
    saved = deepcopy(optimizer.state_dict())
    resumed.load_state_dict(saved)
    for name, p in net.named_parameters():
        own, other = optimizer.state[p], resumed.state[turned.get_parameter(name)]
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    saved["param_groups"][0]["param_names"][0] = "backbone.blocks.7.mixer.out_proj.weight"
    with pytest.raises(CheckpointError, match=r"another model: only one of them has 'backbone.blocks"):
        resumed.load_state_dict(saved)


@pytest.mark.parametrize("named", [True, False])
def test_a_state_is_keyed_by_name_for_shards(named):
    net, config = model(), TrainingConfig()
    optimizer = build_optimiser(net, config)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        if not named:  # as 0.1
            del group["param_names"]
    keyed = keyed_by_name(optimizer, saved)
    for name, p in net.named_parameters():
        assert torch.equal(keyed["state"][name]["exp_avg"], optimizer.state[p]["exp_avg"])
    assert [g["params"] for g in keyed["param_groups"]] == [g["param_names"] for g in optimizer.param_groups]
    other = build_optimiser(net, TrainingConfig(optimizer="muon"))
    with pytest.raises(CheckpointError, match=r"groups of parameters|of another model"):
        keyed_by_name(other, saved)


def test_a_closure_is_called_once_with_gradients():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer, calls = muon(weight), []

    def closure():
        calls.append(1)
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 16 and calls == [1]
    assert not torch.equal(weight.detach(), torch.ones(4, 4))


def test_wsd_rises_stays_and_falls():
    factors = [wsd(step, total=100, warmup=0.1, floor=0.05, decay=0.2) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert all(a > b for a, b in itertools.pairwise(factors[80:]))
    assert factors[100] == pytest.approx(0.05)
    # 1 − sqrt of the part of the fall that is behind.
    assert factors[85] == pytest.approx(0.05 + 0.95 * (1 - 0.25**0.5))
    # Where the end is does not show before the fall.
    assert factors[:61] == pytest.approx([wsd(step, 80, 0.125, 0.05, 0.25) for step in range(61)])
    assert wsd(100, total=100, warmup=0.1, floor=0.0, decay=0.0) == 1.0
    assert cosine(60, total=100, warmup=0.1, floor=0.05) < 1
