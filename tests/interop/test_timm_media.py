"""timm's contract, for the classifiers of videos and sounds that we register with it."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

import omnimix
from omnimix.errors import ConfigError, UnsupportedCall
from omnimix.interop.timm import checkpoint_filter_fn
from omnimix.modalities import create_model, load_model, model_config, save_model

TimmVideoClassifier = omnimix.timm_models.TimmVideoClassifier
NAMES = timm.list_models("omnimix_*", module="timm_media")
TINY = {"embed_dim": 16, "depth": 2, "num_classes": 5}
VIDEO = "omnimix_videomamba_tiny"
# One of each kind; what differs between the others are the mixers, which the plain models' tests run through.
each_model = pytest.mark.parametrize("name", [VIDEO, "omnimix_aum_tiny"])
PUBLISHED = [
    *(f"omnimix_videomamba_{size}" for size in ("tiny", "small", "middle")),
    *(f"omnimix_aum_{size}" for size in ("tiny", "small", "base")),
]


def is_video(name: str) -> bool:
    return isinstance(model_config(name.removeprefix("omnimix_")), omnimix.VideoClassifierConfig)


def tiny(name: str, **options):
    torch.manual_seed(0)
    size = {"num_frames": 4, "img_size": 32} if is_video(name) else {}
    return timm.create_model(name, **TINY | size | options)


def media(name: str) -> torch.Tensor:
    shape = (2, 3, 5, 32, 24) if is_video(name) else (2, 6000)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_every_named_model_is_registered_under_its_medium():
    images = {n for n in omnimix.list_models() if isinstance(model_config(n), omnimix.ImageClassifierConfig)}
    assert NAMES == sorted(f"omnimix_{name}" for name in set(omnimix.list_models()) - images)
    assert set(PUBLISHED) <= set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_built_at_its_size_with_its_default_cfg(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg, config = model.default_cfg, model_config(name.removeprefix("omnimix_"))
    assert model.config == config and cfg["num_classes"] == model.num_classes == config.head.classes
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert cfg["first_conv"] is None or f"{cfg['first_conv']}.weight" in model.state_dict()
    if is_video(name):
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@each_model
def test_features_head_and_classifier(name):
    model, x = tiny(name).eval(), media(name)
    features = model.forward_features(x)
    assert features.shape[0] == 2 and features.shape[2] == model.num_features == model.head_hidden_size
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features[:, 0] if model.global_pool == "token" else features.mean(1))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    torch.testing.assert_close(model.forward_with_losses(x)[0], model(x))

    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.num_classes == 7 and model.global_pool == "avg"
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, prefix:].mean(1))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@each_model
def test_the_same_weights_with_and_without_timm(name, tmp_path):
    model, x = tiny(name).eval(), media(name)
    size = {"size": (4, 32, 32)} if is_video(name) else {}
    plain = create_model(name.removeprefix("omnimix_"), dim=16, depth=2, classes=5, **size).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), model(x))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(plain)
    torch.testing.assert_close(loaded(x), model(x))


@each_model
def test_parameter_groups(name):
    model = tiny(name)
    named = [n for n, _ in model.named_parameters()]
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert sorted(layers) == sorted(named)
    assert {n for n, layer in layers.items() if layer == 0} == {n for n in named if n.startswith("tokenizer.")}
    assert {n for n, layer in layers.items() if layer == 3} == {n for n in named if n.startswith("head.")}
    free = model.no_weight_decay()
    assert "backbone.norm.weight" in free and free <= set(named) and any("positions" in n for n in free)
    groups = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=free)
    assert sum(len(g["params"]) for g in groups) == len(named)


@each_model
def test_grad_checkpointing(name):
    model, gradients = tiny(name).double().eval(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(media(name).double()).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and model.backbone.checkpointing
    torch.testing.assert_close(gradients[1], gradients[0])


def test_video_options():
    model = tiny(
        VIDEO, in_chans=1, num_frames=6, img_size=[32, 64], patch_size=[2, 8, 8], global_pool="max", drop_rate=0.5
    )
    assert model.config.video.size == (6, 32, 64) and model.config.video.tubelet == (2, 8, 8)
    assert (model.in_chans, model.global_pool, model.config.head.dropout) == (1, "max", 0.5)
    assert model(torch.randn(2, 1, 3, 32, 32)).shape == (2, 5)


def test_a_resized_video_model_is_exported_and_comes_back(tmp_path):
    model = tiny(VIDEO).eval()
    model.set_input_size(img_size=48, num_frames=6, patch_size=(2, 8, 8))
    model.reset_classifier(6, "max")
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.config == model.config
    torch.testing.assert_close(again(media(VIDEO)), model(media(VIDEO)))


def test_a_checkpoint_of_another_size_and_other_channels_loads(tmp_path):
    small = tiny(VIDEO).eval()
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"module.{n}": t for n, t in small.state_dict().items()}}, file)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 5}}
    large = tiny(VIDEO, num_frames=8, img_size=64, **options).eval()
    assert large.tokenizer.positions.shape == (4, 4, 16) and large.tokenizer.time_positions.shape == (8, 16)
    x = torch.randn(2, 3, 8, 64, 64)
    torch.testing.assert_close(large(x), small(x))
    grey = tiny(VIDEO, in_chans=1, **options | {"num_classes": 2})
    torch.testing.assert_close(grey.tokenizer.proj.weight, small.tokenizer.proj.weight.sum(1, keepdim=True))
    torch.testing.assert_close(grey.backbone.state_dict(), small.backbone.state_dict())


def test_what_is_refused():
    with pytest.raises(UnsupportedCall, match="feature maps"):
        tiny(VIDEO, features_only=True)
    with pytest.raises(ConfigError, match="in_chans"):
        tiny("omnimix_aum_tiny", in_chans=2)
    with pytest.raises(ConfigError, match="global_pool"):
        tiny(VIDEO, global_pool="avgmax")
    with pytest.raises(ConfigError, match="class_token"):
        tiny("omnimix_vivit_tiny_gla_patch16_224").reset_classifier(5, "token")


def test_lists_of_clips_are_left_to_the_plain_models(without_shape_checks):
    model = timm.create_model("omnimix_aum_tiny", num_classes=5, depth=1)
    with pytest.raises(UnsupportedCall, match="one length"):
        model([torch.randn(8000), torch.randn(5000)])


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_feature_maps_follow_the_depth(depth):
    maps = timm.create_model("omnimix_vig_tiny_patch16_224", depth=depth, features_only=True)(torch.randn(1, 3, 32, 32))
    assert len(maps) == min(4, depth) and all(m.shape[1] == 192 for m in maps)


def test_a_run_s_checkpoint_is_weights():
    model = timm.create_model("omnimix_videomamba_tiny", depth=1, num_classes=3)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    found = checkpoint_filter_fn({"model": {"video": {"dim": 1}}, "state_dict": weights}, model)
    assert found.keys() == model.state_dict().keys()
