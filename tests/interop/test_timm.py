"""timm's contract, for every model that we register with it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import omnimix
from omnimix.backbones import BackboneConfig, StageConfig, to_dict
from omnimix.errors import ConfigError
from omnimix.modalities import create_model, load_model, model_config, save_model

TimmClassifier = omnimix.timm_models.TimmClassifier
# By the module that registers them: those of images, and not those of other media.
NAMES = timm.list_models("omnimix_*", module="timm")
TINY = {"embed_dim": 16, "depth": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


def tiny(name: str, **options) -> TimmClassifier:
    torch.manual_seed(0)
    return timm.create_model(name, **TINY | options)


def images(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


each_model = pytest.mark.parametrize("name", NAMES)
each_token = pytest.mark.parametrize("class_token", [None, "first", "middle"])


def test_every_named_model_is_registered():
    images = [name for name in omnimix.list_models() if isinstance(model_config(name), omnimix.ImageClassifierConfig)]
    assert NAMES == [f"omnimix_{name}" for name in images]
    assert "omnimix_vig_tiny_patch16_224" in NAMES


@each_model
def test_full_size_forward_and_backward(name, without_gradient):
    model = timm.create_model(name, num_classes=42)

    def loss(model):
        # 49 tokens are enough for every part of every mixer.
        logits = model(images(112, 112))
        assert logits.shape == (2, 42) and logits.isfinite().all()
        # Not the mean: every class gets its own weight, so that no gradient cancels.
        return (logits * torch.linspace(-1, 2, 42)).sum()

    assert not without_gradient(model, loss)


@each_model
def test_default_cfg(name):
    model = tiny(name)
    cfg, weights = model.default_cfg, model.state_dict()
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000
    assert f"{cfg['first_conv']}.weight" in weights and f"{cfg['classifier']}.weight" in weights
    assert timm.data.resolve_model_data_config(model)["interpolation"] == "bicubic"


@each_model
@each_token
def test_features_and_head(name, class_token):
    model = tiny(name, class_token=class_token, global_pool="token" if class_token else "avg").eval()
    x = images(24, 40)
    features = model.forward_features(x)
    assert features.shape == (2, 15 + model.num_prefix_tokens, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features[:, 0] if class_token else features.mean(1))
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))


@each_model
def test_reset_classifier(name):
    model = tiny(name).eval()
    x = images(32, 32)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert model.get_classifier().out_features == 7 and not model.head.training
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.global_pool == "max"


@each_model
@each_token
def test_forward_intermediates(name, class_token):
    model = tiny(name, class_token=class_token).eval()
    x = images(24, 40)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, info["num_chs"], 3, 5) for info in model.feature_info]

    rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close([m.flatten(2).mT for m in maps], rows)

    features, normed = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True)
    last = torch.cat(normed[-1][::-1], dim=1) if class_token else normed[-1]
    torch.testing.assert_close(last, features)

    early = model.forward_intermediates(x, [0, -2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[:2])
    torch.testing.assert_close(model.forward_intermediates(x, 2, intermediates_only=True), maps[1:])
    with pytest.raises(ConfigError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_stopping_early_computes_no_later_block():
    model = tiny(NAMES[-1])
    ran = []
    for i, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(images(32, 32), [1], stop_early=True)
    assert ran == [0, 1]


@each_model
def test_prune_intermediate_layers(name):
    model = tiny(name).eval()
    x = images(32, 32)
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(model.backbone.blocks) == 2 and model.num_classes == 0
    torch.testing.assert_close(model.forward_intermediates(x, [0, 1], intermediates_only=True), expected)


@each_model
def test_features_only(name):
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, **{k: v for k, v in TINY.items() if k != "depth"}).eval()
    assert net.feature_info.channels() == [16] * 4 and net.feature_info.reduction() == [8] * 4
    assert net.out_indices == [2, 5, 8, 11]
    maps = net(images(16, 24))
    assert [m.shape for m in maps] == [(2, 16, 2, 3)] * 4
    chosen = tiny(name, features_only=True, out_indices=(0, 2)).eval()
    whole = tiny(name).eval()
    torch.testing.assert_close(
        chosen(images(16, 24)), whole.forward_intermediates(images(16, 24), [0, 2], intermediates_only=True)
    )


@each_model
def test_set_input_size(name):
    model = tiny(name).eval()
    x = images(48, 64)
    before = model(x)
    model.set_input_size(img_size=(48, 64))
    assert model.tokenizer.positions.shape == (6, 8, 16)
    torch.testing.assert_close(model(x), before)
    model.set_input_size(patch_size=16)
    assert model.forward_features(x).shape[1] == 12 and model.feature_info[0]["reduction"] == 16
    assert model.config.image.size == (48, 64) and model.config.image.patch == (16, 16)
    model(x).sum().backward()


@each_model
def test_any_size_and_channels(name):
    model = tiny(name, in_chans=1).eval()
    for size in ((32, 32), (17, 50), (3, 3)):
        assert model(images(*size, channels=1)).shape == (2, 5)


@each_model
def test_group_matcher(name):
    model = tiny(name)
    named = [n for n, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(named)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {n for n, layer in layers.items() if layer == 0} == {n for n in named if n.startswith("tokenizer.")}
    assert {n for n, layer in layers.items() if layer == 4} == {n for n in named if n.startswith("head.")}
    assert layers["backbone.norm.weight"] == 3
    assert len(set(layers.values())) == 5
    decayed = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(g["params"]) for g in decayed) == len(named)


@each_model
def test_no_weight_decay(name):
    model = tiny(name, class_token="first")
    free = model.no_weight_decay()
    assert free <= {n for n, _ in model.named_parameters()}
    assert {"tokenizer.positions", "tokenizer.class_token", "backbone.norm.weight"} <= free
    kept, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=free)
    assert kept["weight_decay"] == 0 and {id(p) for p in kept["params"]} >= {
        id(p) for n, p in model.named_parameters() if n in free
    }
    assert any(p is model.head.classifier.weight for p in decayed["params"])


@each_model
def test_grad_checkpointing(name):
    model = tiny(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images(32, 32)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_grad_checkpointing_keeps_less():
    model = tiny(NAMES[-1])
    saved = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            model(images(32, 32))
        saved.append(sum(kept))
    assert saved[1] < saved[0] / 2


def test_drop_rates_act_in_training_only():
    model = tiny(NAMES[0], drop_rate=0.5, drop_path_rate=0.5)
    x = images(32, 32)
    assert not torch.equal(model(x), model(x))
    assert model.backbone.blocks[0].mixer_residual.drop_path == 0
    assert model.backbone.blocks[-1].ffn_residual.drop_path == 0.5
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_command_of_the_readme_trains_a_step():
    model = timm.create_model("omnimix_vig_tiny_patch16_224", num_classes=10, img_size=256)
    assert model.tokenizer.positions.shape == (16, 16, 192)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    x, y = images(256, 256), torch.tensor([1, 7])
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.any() for p in model.parameters())
    assert losses[1] < losses[0]


# Checkpoints


@pytest.mark.parametrize("name", ["omnimix_vig_tiny_patch16_224", "omnimix_vit_tiny_attention_patch16_224"])
def test_a_checkpoint_of_another_size_loads(tmp_path, name):
    small = tiny(name, img_size=64).eval()
    file = tmp_path / "checkpoint.pth"
    wrapped = {f"module.{n}": t for n, t in small.state_dict().items()}
    torch.save({"epoch": 3, "arch": name, "state_dict": wrapped}, file)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 5}}
    large = tiny(name, img_size=96, **options).eval()
    assert large.tokenizer.positions.shape == (12, 12, 16)
    torch.testing.assert_close(large(images(96, 96)), small(images(96, 96)))
    # Another head and other channels: the rest of the weights are taken over.
    other = tiny(name, img_size=96, **options | {"num_classes": 2, "in_chans": 1}).eval()
    torch.testing.assert_close(other.backbone.state_dict(), small.backbone.state_dict())
    torch.testing.assert_close(other.tokenizer.proj.weight, small.tokenizer.proj.weight.sum(1, keepdim=True))


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        tiny(NAMES[0], pretrained=True)


def test_the_same_weights_with_and_without_timm(tmp_path):
    model = tiny("omnimix_vig_tiny_patch16_224", class_token="middle", global_pool="token").eval()
    plain = create_model(
        "vig_tiny_patch16_224", dim=16, depth=3, size=32, patch=8, classes=5, class_token="middle", pool="class_token"
    ).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images(24, 40)), model(images(24, 40)))
    model.set_input_size(img_size=40)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is omnimix.ImageClassifier
    torch.testing.assert_close(loaded(images(24, 40)), model(images(24, 40)))


def test_export_and_return(tmp_path):
    model = tiny("omnimix_vig_tiny_patch16_224").eval()
    model.set_input_size(img_size=48, patch_size=4)
    model.reset_classifier(6, "max")
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(images(48, 48)), model(images(48, 48)))


def test_wrong_options():
    with pytest.raises(ConfigError, match="global_pool"):
        tiny(NAMES[0], global_pool="avgmax")
    with pytest.raises(ConfigError, match="class_token"):
        tiny(NAMES[0]).reset_classifier(5, "token")
    with pytest.raises(ConfigError, match="no option 'num_heds'"):
        tiny(NAMES[0], num_heds=3)


def test_models_are_copied_and_moved():
    model = tiny(NAMES[0]).double().eval()
    model.reset_classifier(4)
    assert copy.deepcopy(model)(images(32, 32).double()).dtype == torch.float64


def test_a_backbone_replaces_the_named_one_whole_or_in_short():
    name = "omnimix_vit_tiny_gla_patch16_224"
    small = {"img_size": 32, "patch_size": 8, "num_classes": 3}
    backbone = omnimix.BackboneConfig(dim=16, depth=2, pattern=["mamba2"], scan="cross", residual="sandwich")
    for given in (backbone, to_dict(backbone)):
        assert timm.create_model(name, backbone=given, **small).config.backbone == backbone
    short = timm.create_model(name, embed_dim=16, depth=2, mixer="mamba2", ffn="mlp", scan="cross", **small)
    assert short.config.backbone.pattern == ("mamba2",) and short.config.backbone.ffn.type == "mlp"
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        timm.create_model(name, dpth=2, **small)
    # Our own names are not timm's.
    for option in ({"dim": 16}, {"classes": 5}, {"size": 64}):
        with pytest.raises(ConfigError, match="there is no option"):
            timm.create_model(name, **option, **small)


def test_a_pyramids_features_have_the_sizes_of_their_stages():
    stages = [StageConfig(dim=16, depth=1), StageConfig(dim=24, depth=1, transition="merge")]
    backbone = BackboneConfig(dim=16, depth=2, scan="bidirectional", pattern=["gla"], stages=stages)
    options = {"img_size": 16, "patch_size": 4, "backbone": backbone}
    images = torch.randn(2, 3, 16, 16)
    whole = timm.create_model("omnimix_vig_tiny_patch16_224", **options)
    features, maps = whole.forward_intermediates(images, norm=True)
    assert features.shape == (2, 4, 24)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4), (2, 24, 2, 2)]
    for indices in ([0], [0, 1]):
        some = timm.create_model("omnimix_vig_tiny_patch16_224", features_only=True, out_indices=indices, **options)
        assert some.feature_info.channels() == [(16, 24)[i] for i in indices]
        assert some.feature_info.reduction() == [(4, 8)[i] for i in indices]
        assert [tuple(m.shape) for m in some(images)] == [tuple(maps[i].shape) for i in indices]


def test_a_pruned_pyramid_is_what_is_left_of_it():
    stages = [StageConfig(dim=16, depth=2), StageConfig(dim=24, depth=2, transition="merge", pattern=["attention"])]
    backbone = BackboneConfig(dim=16, depth=4, scan="cross", pattern=["gla"], stages=stages)
    model = timm.create_model("omnimix_vig_tiny_patch16_224", img_size=16, patch_size=4, backbone=backbone).eval()
    # The tokenizer gives positions, in all stages.
    assert [layer.mixer.rope for layer in model.backbone.config.layers[2:]] == [False, False]
    images = torch.randn(2, 3, 16, 16)
    _, maps = model.forward_intermediates(images)
    for indices, width in (([1, 2], 24), ([0], 16)):
        assert model.prune_intermediate_layers(indices) == indices
        assert len(model.feature_info) == len(model.backbone.blocks) == indices[-1] + 1
        assert model.num_features == width and model.forward_features(images).shape[-1] == width
        found = model.forward_intermediates(images, indices, intermediates_only=True)
        torch.testing.assert_close(found, [maps[i] for i in indices])
    assert isinstance(model.backbone.norm, torch.nn.Identity) and not model.backbone.transitions


def test_features_of_a_given_backbone_are_at_its_depth():
    backbone = to_dict(BackboneConfig(dim=16, depth=2, scan="bidirectional"))
    name, options = "omnimix_vig_tiny_patch16_224", {"img_size": 16, "patch_size": 4}
    assert len(timm.create_model(name, features_only=True, backbone=backbone, **options)(images(16, 16))) == 2
