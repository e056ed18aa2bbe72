"""Named models, and models as folders."""

from __future__ import annotations

import json

import pytest
import torch

from omnimix.backbones import BackboneConfig, from_dict, list_mixers, to_dict
from omnimix.backbones.heads import ClassificationHeadConfig
from omnimix.errors import CheckpointError, ConfigError, UnknownName
from omnimix.modalities import (
    ImageClassifier,
    ImageClassifierConfig,
    PatchTokenizerConfig,
    build_model,
    create_model,
    list_models,
    load_model,
    load_weights,
    model_config,
    models,
    read_details,
    register_model,
    save_model,
    save_weights,
)

from ..laws.zeros import without_zeros

SMALL = {"classes": 3, "size": 16, "patch": 4, "dim": 16, "depth": 2}


def small(mixer: str = "attention", **options) -> ImageClassifier:
    torch.manual_seed(0)
    return create_model(f"vit_tiny_{mixer}_patch16_224", **SMALL | options)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# Names


def test_published_sizes():
    published = {"vig_tiny_patch16_224": 6e6, "vig_small_patch16_224": 23e6, "vig_base_patch16_224": 89e6}
    for name, size in published.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in create_model(name).parameters())
        assert abs(parameters / size - 1) < 0.05, f"{name} has {parameters}"


def test_there_is_a_model_for_every_mixer():
    assert {f"vit_tiny_{mixer}_patch16_224" for mixer in list_mixers()} <= set(list_models())


@pytest.mark.parametrize("mixer", list_mixers())
@pytest.mark.parametrize("class_token", [None, "middle"])
def test_every_mixer_classifies_images_of_any_size(mixer, class_token, without_gradient):
    model = small(mixer, class_token=class_token, pool="class_token" if class_token else "mean")
    for size in ((16, 16), (9, 23)):
        logits = model(images(*size))
        assert logits.shape == (2, 3) and logits.isfinite().all()
    tokens, layout = model.forward_features(images(16, 16))
    torch.testing.assert_close(model.forward_head(tokens, layout), model(images(16, 16)))
    # Sums of logits could cancel; weights keep every class apart. 49 tokens are enough for every part of every mixer.
    weights = torch.tensor([1.0, -2.0, 3.0])
    assert not without_gradient(model, lambda model: (model(images(28, 28)) * weights).sum())


@pytest.mark.parametrize("mixer", list_mixers())
def test_the_first_patch_sees_the_last(mixer):
    model = without_zeros(small(mixer, positions="none")).eval()
    x = images(16, 16).requires_grad_()
    tokens, _ = model.forward_features(x)
    tokens[0, 0].sum().backward()
    assert x.grad[0, :, -4:, -4:].abs().max() > 0
    assert x.grad[1].abs().max() == 0


def test_overrides():
    config = model_config("vig_tiny_patch16_224", classes=7, channels=1, size=(64, 96), drop_path=0.1, dropout=0.2)
    assert (config.head.classes, config.image.channels, config.image.size) == (7, 1, (64, 96))
    assert (config.backbone.drop_path, config.head.dropout) == (0.1, 0.2)
    assert config.backbone.pattern == ("gla",) and config.backbone.scan == "bidirectional"
    hybrid = model_config("vig_tiny_patch16_224", mixer="attention+gla")
    assert not hybrid.backbone.mixers["attention"].rope


def test_rotary_positions_only_without_learned_ones():
    learned = model_config("vit_tiny_attention_patch16_224")
    assert not learned.backbone.mixers["attention"].rope
    assert model_config("vit_tiny_attention_patch16_224", positions="none").backbone.mixers == {}
    assert model_config("vit_tiny_attention_patch16_224", backbone=None).backbone == learned.backbone


def test_unknown_names_say_what_is_near():
    with pytest.raises(UnknownName, match="vig_tiny_patch16_224"):
        create_model("vig_tinny_patch16_224")
    with pytest.raises(ConfigError, match="classes"):
        create_model("vig_tiny_patch16_224", clases=10)
    with pytest.raises(ConfigError, match="ImageClassifierConfig"):
        build_model(PatchTokenizerConfig(dim=8))


def test_parts_must_fit():
    image, backbone = PatchTokenizerConfig(dim=8), BackboneConfig(dim=16, depth=1)
    with pytest.raises(ConfigError, match="image.dim is 8"):
        ImageClassifierConfig(image=image, backbone=backbone, head=ClassificationHeadConfig())
    with pytest.raises(ConfigError, match="class_token"):
        model_config("vig_tiny_patch16_224", pool="class_token")


def test_a_name_of_ones_own(monkeypatch):
    monkeypatch.setattr(models, "_factories", dict(models._factories))

    def factory(classes: int = 3) -> ImageClassifierConfig:
        return model_config("vit_tiny_linear_patch16_224", **SMALL | {"classes": classes})

    register_model("mine", factory)
    assert create_model("mine", classes=5)(images(16, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="mine"):
        register_model("mine", factory)


@pytest.mark.parametrize("name", list_models())
def test_configurations_survive_json(name):
    config = model_config(name, classes=5)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


# Folders


def test_round_trip(tmp_path):
    model = small("gla").eval()
    save_model(model, tmp_path, details={"classes": ["a", "b", "c"]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(images(16, 16)), model(images(16, 16)))
    assert read_details(tmp_path) == {"classes": ["a", "b", "c"]}


def test_saving_over_an_older_model(tmp_path):
    save_model(small(), tmp_path)
    model = small(depth=1).eval()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(images(16, 16)), model(images(16, 16)))


@pytest.mark.parametrize("positions", ["learned", "factorised"])
def test_a_model_loads_at_another_size(tmp_path, positions):
    model = small(positions=positions).eval()
    save_model(model, tmp_path)
    larger = load_model(tmp_path, size=(24, 40))
    assert larger.config.image.size == (24, 40)
    torch.testing.assert_close(larger(images(24, 40)), model(images(24, 40)))


def test_compiled_models_have_plain_names(tmp_path):
    model = small().eval()
    model.backbone.blocks[0] = torch.compile(model.backbone.blocks[0], backend="eager")
    save_model(torch.compile(model, backend="eager"), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]
    torch.testing.assert_close(load_model(tmp_path)(images(16, 16)), small().eval()(images(16, 16)))
    compiled = torch.compile(small(), backend="eager")
    load_weights(compiled, tmp_path / "model.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "flipped header"])
def test_corrupt_weights(tmp_path, damage):
    save_model(small(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        broken = {
            "truncated": whole[:-100],
            "empty": b"",
            "text": b"not weights",
            "flipped header": whole[:20] + b"\xff" + whole[21:],
        }
        file.write_bytes(broken[damage])
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for load in (lambda: load_model(tmp_path), lambda: load_weights(model, file)):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            load()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"depth": 1}, "backbone.blocks.1.* is missing"),
        ({"depth": 3}, "backbone.blocks.2.* is unknown"),
        ({"classes": 4}, r"head.classifier.weight is \(4, 16\), and in the model \(3, 16\)"),
        ({"size": 32}, "tokenizer.positions"),
    ],
)
def test_weights_of_another_model_load_nothing(tmp_path, other, words):
    save_weights(small(**other), tmp_path / "other.safetensors")
    torch.manual_seed(5)
    model = create_model("vit_tiny_attention_patch16_224", **SMALL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, tmp_path / "other.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json"),
        ("[]", "'model' and 'config'"),
        ('{"model": "ImageClasifier", "config": {}}', "ImageClassifier"),
        ('{"model": "ImageClassifier", "config": {}}', "needs image"),
        ('{"model": "ImageClassifier", "config": []}', "does not describe"),
    ],
)
def test_corrupt_configurations(tmp_path, content, words):
    save_model(small(), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path)


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    model = small().eval()
    save_model(model, tmp_path)

    def crash(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        save_model(small("linear"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path)(images(16, 16)), model(images(16, 16)))


def test_only_registered_classes_are_saved(tmp_path):
    with pytest.raises(ConfigError, match="Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path)
