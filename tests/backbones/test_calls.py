"""What a backbone refuses of a call's arguments, and what weights that several blocks share survive."""

from __future__ import annotations

import copy

import pytest
import torch

from omnimix import kernels
from omnimix.backbones import (
    Backbone,
    BackboneConfig,
    BlockConfig,
    LanguageModel,
    LanguageModelConfig,
    Layout,
    StageConfig,
)
from omnimix.backbones.residual.norms import PreConfig
from omnimix.backbones.transition.skip import SkipConfig
from omnimix.errors import ConfigError, UnknownName, UnsupportedShape
from omnimix.modalities import load_model, save_model

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def net(depth: int = 2, **options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(dim=16, depth=depth, pattern=["gla"], **options))


@pytest.mark.parametrize("causal", [1, 0, "yes", None])
def test_what_only_looks_like_a_truth_value_is_refused(causal, without_shape_checks):
    with pytest.raises(ConfigError, match="causal is .*; it must be True, False or 'block'"):
        Layout(causal=causal)


def test_a_state_that_is_not_the_backbones_own_is_refused(without_shape_checks):
    deep, shallow = net(2), net(1)
    with pytest.raises(UnsupportedShape, match="nothing of blocks.1"):
        deep(X, Layout(), shallow(X, Layout()).state)
    with pytest.raises(UnsupportedShape, match="state holds blocks.1"):
        shallow(X, Layout(), deep(X, Layout()).state)
    half = deep(X, Layout(), depth=1)
    with pytest.raises(UnsupportedShape, match="another `depth`"):
        deep(X, Layout(), half.state)
    with pytest.raises(UnsupportedShape, match="state is a Output"):
        deep(X, Layout(), half)
    whole = deep(torch.cat([X, X], dim=1), Layout(), depth=1).y
    assert torch.allclose(deep(X, Layout(), half.state, depth=1).y, whole[:, 6:], atol=1e-6)


@pytest.mark.parametrize("taps", [("blocks.2",), ("stages.1",), ("input",), "blocks.1"])
def test_taps_that_are_none_are_refused(taps):
    with pytest.raises(ConfigError, match=r"taps is .*blocks\.0, blocks\.1, stages\.0"):
        net()(X, Layout(), taps=taps)


def test_taps_after_the_last_block_that_runs_are_refused():
    with pytest.raises(ConfigError, match=r"taps is .*names out of blocks\.0, stages\.0$"):
        net()(X, Layout(), taps=("blocks.1",), depth=1)


@pytest.mark.parametrize("shape", [(6, 16), (2, 6, 8), (2, 6, 1, 16)])
def test_what_are_no_tokens_of_its_width_is_refused(shape, without_shape_checks):
    with pytest.raises(UnsupportedShape, match=r"x: shape .* is not \(b, t, 16\)"):
        net()(torch.zeros(shape), Layout())


@pytest.mark.parametrize("depth", [0, -1, 3])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(ConfigError, match=f"depth is {depth}; it must be from 1 to 2"):
        net()(X, Layout(), depth=depth)


def test_a_backend_that_is_none_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'native'"), kernels.using("nativ"):
        pass


TIED = {"pattern": [BlockConfig(mixer="gla", tie="a")], "residual": PreConfig(layer_scale=0.1)}


def tied() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(dim=16, depth=3, **TIED))


def test_shared_weights_stay_shared():
    whole = tied()
    count = len(list(whole.parameters()))
    with torch.device("meta"):
        empty, assigned = tied(), tied()
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assigned.load_state_dict(copy.deepcopy(whole.state_dict()), assign=True)
    for again in (empty, assigned, copy.deepcopy(whole), tied().double().float()):
        assert len(list(again.parameters())) == count
        assert torch.equal(again(X, Layout()).y, whole(X, Layout()).y)


def test_shared_weights_are_saved_once(tmp_path):
    config = BackboneConfig(dim=16, depth=3, **TIED)
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(backbone=config, vocab_size=11))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_a_language_models_head_has_the_width_of_the_last_stage():
    stages = [StageConfig(dim=16, depth=1), StageConfig(dim=8, depth=1, transition=SkipConfig(source="stages.0"))]
    config = BackboneConfig(dim=16, depth=2, pattern=["gla"], stages=stages)
    ids = torch.arange(8).view(1, 8)
    model = LanguageModel(LanguageModelConfig(backbone=config, vocab_size=11, tie_word_embeddings=False))
    assert model(ids)[0].shape == (1, 8, 11)
    with pytest.raises(ConfigError, match="set tie_word_embeddings=False"):
        LanguageModel(LanguageModelConfig(backbone=config, vocab_size=11))


def test_a_backbone_is_exported():
    whole = net().eval()
    exported = torch.export.export(whole, (X, Layout())).module()
    assert torch.equal(exported(X, Layout()).y, whole(X, Layout()).y)
