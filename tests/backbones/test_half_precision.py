"""In float16, whose numbers end at 65504, long sequences are mixed as in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from omnimix.backbones import Layout
from omnimix.backbones.config import Site
from omnimix.backbones.context import Context
from omnimix.backbones.mixers import get_mixer, list_mixers
from omnimix.backbones.mixers.linear import LinearConfig

from ..laws.zeros import without_zeros

TIME = 1500


def mixed(name, options, dim, layout):
    """The outputs in float16, and in float64 with the same weights."""
    torch.manual_seed(0)
    module = without_zeros(get_mixer(name).build(dim, options, Site())).half()
    x, context = torch.randn(1, TIME, dim).half(), Context(layout)
    with torch.no_grad():
        return module(x, context).y.double(), copy.deepcopy(module).double()(x.double(), context).y


def far(found, right):
    assert found.isfinite().all()
    return (found - right).square().mean(1).sqrt().div(right.square().mean(1).sqrt()).max().item()


LAYOUTS = {
    "causal": Layout(causal=True),
    "bidirectional": Layout(causal=False),
    "blocks": Layout(causal="block", block=500),
    "packed": Layout(causal=True, cu_seqlens=torch.tensor([0, TIME - 3, TIME])),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_normalisers_of_linear_attention_stay_within_reach(layout):
    # One head: the normaliser is the sum of 128 channels over 1500 tokens.
    found, right = mixed("linear", LinearConfig(heads=1), 128, layout)
    assert far(found, right) < 0.05
    assert found.square().sum(-1).min() > 0


@pytest.mark.parametrize(
    "name", [n for n in list_mixers() if get_mixer(n).build.capabilities.causal and n != "cross_attention"]
)
def test_every_mixer_is_right(name):
    found, right = mixed(name, get_mixer(name).examples[0], 48, LAYOUTS["causal"])
    assert far(found, right) < 0.05
