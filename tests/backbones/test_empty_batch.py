"""A batch without rows is served: outputs without rows, and zeros for gradients."""

from __future__ import annotations

import pytest
import torch

from omnimix import LanguageModel, LanguageModelConfig
from omnimix.backbones import Backbone, BackboneConfig, Layout
from omnimix.backbones.ffn import list_ffns
from omnimix.backbones.heads import ClassificationHead, ClassificationHeadConfig, list_objectives
from omnimix.backbones.mixers import get_mixer, list_mixers
from omnimix.errors import UnsupportedShape

DIM = 48
MIXERS = [name for name in list_mixers() if name != "cross_attention"]


def served(net, layout):
    x = torch.randn(0, 6, DIM, requires_grad=True)
    out = net(x, layout)
    assert out.y.shape == x.shape
    (out.y.sum() + sum(out.losses.values())).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    return out


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_serves_it(name):
    mixers = {name: get_mixer(name).examples[0]}
    net = Backbone(BackboneConfig(dim=DIM, depth=1, pattern=[name], mixers=mixers))
    out = served(net, Layout(causal=True))
    with torch.no_grad():
        assert net(torch.randn(0, 1, DIM), Layout(causal=True), out.state.detach()).y.shape == (0, 1, DIM)
    if get_mixer(name).build.capabilities.bidirectional:
        served(net, Layout(causal=False))


@pytest.mark.parametrize("name", list_ffns())
def test_every_feed_forward_layer_serves_it(name):
    served(Backbone(BackboneConfig(dim=DIM, depth=2, pattern=["gla"], ffn=name)), Layout(causal=True))


def test_a_head_serves_it():
    head = ClassificationHead(DIM, ClassificationHeadConfig(classes=3))
    assert head(torch.randn(0, 6, DIM), Layout(causal=False, grid=(1, 2, 3))).shape == (0, 3)


@pytest.mark.parametrize("objective", list_objectives())
def test_a_loss_of_nothing_is_refused(objective):
    backbone = BackboneConfig(dim=DIM, depth=1, pattern=["attention"])
    net = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=9, objective=objective))
    with pytest.raises(UnsupportedShape, match="none is left"):
        net.loss(torch.zeros(0, 6, dtype=torch.int64))
