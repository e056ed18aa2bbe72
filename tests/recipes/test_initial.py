"""`--init`, frozen parameters and rates by layer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimix as om
from omnimix.__main__ import main
from omnimix.errors import CheckpointError, ConfigError, UnknownName
from omnimix.recipes.common.freezing import freeze
from omnimix.recipes.common.initial import initialise
from omnimix.recipes.common.optimisers import build_optimiser
from omnimix.recipes.common.training import TrainingConfig
from omnimix.recipes.vision.recipe import VisionClassification

FAST = {"accelerator": "cpu", "threads": 1, "max_epochs": 1, "limit_train_batches": 2, "batch_size": 4, "ema": 0.0}


def tensors(classes: int, channels: int = 1, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    found = {}
    for split, count in (("train", 12), ("val", 6)):
        found[f"{split}_images"] = torch.rand(count, channels, size, size, generator=generator)
        found[f"{split}_labels"] = torch.arange(count) % classes
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> om.Run:
    """A run of a tiny model of three classes."""
    place = tmp_path_factory.mktemp("source")
    return om.fit("vision", tensors(3), runs=place, mixer="gla", dim=16, depth=2, lr=1e-2, **FAST)


def weights(run: om.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model.safetensors")


def test_a_fit_begins_with_the_weights_and_nothing_else(source: om.Run, tmp_path: Path, capsys):
    run = om.fit("vision", tensors(5), runs=tmp_path, init=source.path, lr=1e-30, weight_decay=0.0, **FAST)
    said = capsys.readouterr().out
    # The classes are called by their numbers, of which three are the same.
    assert "tensors loaded" in said and "head.classifier.weight has 3 of 5 classes from there" in said
    assert "has 3 of 5 classes" in run.metrics["init"]
    assert run.evaluate()["val/loss"] == pytest.approx(run.metrics["val/loss"], abs=1e-5)
    before, after = weights(source), weights(run)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith("head."):
            torch.testing.assert_close(after[name][:3], tensor, atol=1e-6, rtol=0)
        else:
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0, msg=name)
    # Inputs are normalised as the weights are used to, and the features are those of the source.
    assert run.predictor.preprocess.mean == source.predictor.preprocess.mean
    image = torch.rand(1, 8, 8)
    torch.testing.assert_close(run.predictor.features(image), source.predictor.features(image), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_sources(kind: str, source: om.Run, tmp_path: Path):
    if kind == "folder":
        source.predictor.save(tmp_path / "saved")
        place = tmp_path / "saved"
    elif kind == "file":
        save_file({f"model.{name}": tensor for name, tensor in weights(source).items()}, tmp_path / "w.safetensors")
        place = tmp_path / "w.safetensors"
    else:
        place = source.path / "checkpoints" / "last.ckpt"
    run = om.fit("vision", tensors(3), runs=tmp_path, init=place, mixer="gla", dim=16, depth=2, lr=1e-30, **FAST)
    name = "backbone.blocks.0.mixer.out_proj.weight"
    torch.testing.assert_close(weights(run)[name], weights(source)[name], atol=1e-6, rtol=0)
    new = "head.classifier.weight is new" in run.metrics["init"]
    assert new == (kind != "folder")


def test_other_sizes_and_channels(source: om.Run, tmp_path: Path, capsys):
    om.fit("vision", tensors(3, channels=3, size=12), runs=tmp_path, init=source.path, **FAST)
    said = capsys.readouterr().out
    assert "tokenizer.proj.weight from 1 channels" in said and "tokenizer.positions resized from" in said


def test_a_resumed_run_loads_its_own_state(source: om.Run, tmp_path: Path, capsys):
    om.fit("vision", tensors(5), runs=tmp_path, init=source.path, **FAST)
    capsys.readouterr()
    run = om.fit("vision", runs=tmp_path, resume=True, max_epochs=2)
    assert "tensors loaded" not in capsys.readouterr().out and run.metrics["epochs"] == 2
    # The statistics that came with the weights are the model's, in what is trained, measured and saved later.
    assert run.predictor.preprocess.mean == source.predictor.preprocess.mean
    assert run.evaluate()["val/loss"] == pytest.approx(run.metrics["val/loss"], abs=1e-5)


def test_text_takes_the_tokenizer_too(tmp_path: Path, capsys):
    options = {"length": 16, "max_steps": 2, "accelerator": "cpu", "threads": 1, "batch_size": 2, "cache": tmp_path}
    for name, line in (("old", "one two three\n"), ("new", "four five six\n")):
        (tmp_path / f"{name}.txt").write_text(line * 6000)
    model = {"mixer": "gla", "dim": 16, "depth": 1, "vocab_size": 300}
    first = om.fit("text", tmp_path / "old.txt", name="old", runs=tmp_path, **model, **options)
    again = om.fit("text", tmp_path / "new.txt", name="new", runs=tmp_path, init=first.path, **options)
    assert "tensors loaded" in capsys.readouterr().out
    assert (again.path / "tokenizer.json").read_bytes() == (first.path / "tokenizer.json").read_bytes()


def test_a_state_with_no_steps_left(source: om.Run, tmp_path: Path, capsys):
    state = source.path / "checkpoints" / "last.ckpt"
    save_file(tensors(3), tmp_path / "t.safetensors")
    words = ["vision", "fit", f"--data={tmp_path / 't.safetensors'}", f"--runs={tmp_path}", "--trainer.max_epochs=1"]
    words += ["--model.mixer=gla", "--model.dim=16", "--model.depth=2", "--data.batch_size=4", "--model.training.ema=0"]
    assert main([*words, "--trainer.limit_train_batches=2", f"--ckpt_path={state}"]) == 2
    assert "has made all its 2 steps" in capsys.readouterr().err and not (tmp_path / "vision").exists()
    om.fit("vision", runs=source.path.parent, resume=True)
    assert "larger --trainer.max_epochs (or max_steps), with --resume" in capsys.readouterr().out


def test_nothing_is_loaded_where_too_little_fits(source: om.Run):
    module = VisionClassification(backbone=om.BackboneConfig(dim=16, depth=9, pattern=["mamba2"], scan="bidirectional"))
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="less than half"):
        initialise(module, None, str(source.path))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.model.state_dict().items())


def test_what_does_not_fit(source: om.Run, tmp_path: Path, capsys):
    with pytest.raises(CheckpointError, match="less than half .* same mixer, width and depth"):
        om.fit("vision", tensors(3), runs=tmp_path, init=source.path, dim=32, **FAST)
    with pytest.raises(CheckpointError, match="not a run directory"):
        om.fit("vision", tensors(3), runs=tmp_path, init="nothing", **FAST)
    with pytest.raises(ConfigError, match="timm's weights have other names"):
        om.fit("vision", tensors(3), runs=tmp_path, init="timm:vit_tiny_patch16_224", **FAST)
    (tmp_path / "w.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot read"):
        om.fit("vision", tensors(3), runs=tmp_path, init=tmp_path / "w.pt", **FAST)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        om.fit("vision", tensors(3), runs=tmp_path, init=tmp_path / "w.pt", **FAST)
    assert not (tmp_path / "vision").exists()


def test_frozen_parameters_stay(source: om.Run, tmp_path: Path):
    run = om.fit(
        "vision", tensors(3), runs=tmp_path, init=source.path, freeze="backbone,tokenizer", **FAST | {"lr": 0.1}
    )
    changed = {name for name, tensor in weights(run).items() if not torch.equal(tensor, weights(source)[name])}
    assert changed == {"head.classifier.weight", "head.classifier.bias"}
    assert "freeze:" in (run.path / "config.yaml").read_text()


def test_patterns():
    module = VisionClassification(training=replace(VisionClassification().training_config, freeze=("*.norm.*",)))
    module.setup("fit")
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    assert frozen and all(".norm." in name for name in frozen)
    with pytest.raises(UnknownName, match="did you mean 'backbone'"):
        freeze(module, ["backbon"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(module, ["backbone", "tokenizer", "head"])
    assert TrainingConfig(freeze="a, b").freeze == ("a", "b")


def test_batch_norms_that_are_frozen_keep_their_statistics():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    freeze(module, ["0"])
    assert not module[0].training and module[1].training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_from_layer_to_layer(optimizer: str):
    module = VisionClassification(backbone=om.BackboneConfig(dim=16, depth=2, pattern=["gla"], scan="bidirectional"))
    plain = build_optimiser(module, TrainingConfig(optimizer=optimizer, lr=1.0))
    found = build_optimiser(module, TrainingConfig(optimizer=optimizer, lr=1.0, layer_decay=0.5))
    rates = {name: group["lr"] for group in found.param_groups for name in group["param_names"]}
    assert rates.keys() == {name for group in plain.param_groups for name in group["param_names"]}
    assert {group["lr"] for group in plain.param_groups} == {1.0}
    for part, rate in (
        ("head.", 1.0),
        ("backbone.norm", 1.0),
        ("blocks.1.", 0.5),
        ("blocks.0.", 0.25),
        ("tokenizer", 0.125),
    ):
        assert {r for name, r in rates.items() if part in name} == {rate}, part
    with pytest.raises(ConfigError, match="layer_decay is 0"):
        TrainingConfig(layer_decay=0.0)


def test_the_command(source: om.Run, tmp_path: Path, capsys):
    file = tmp_path / "t.safetensors"
    save_file(tensors(3), file)
    words = ["vision", "fit", f"--data={file}", f"--runs={tmp_path}", f"--init={source.path}", "--threads=1"]
    assert (
        main([*words, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--model.training.layer_decay=0.8"]) == 0
    )
    assert "tensors loaded" in capsys.readouterr().out
    assert json.loads((tmp_path / "vision" / "metrics.json").read_text())["init"].startswith(str(source.path))
