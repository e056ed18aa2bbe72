"""The parts that every recipe trains with."""

import errno
import itertools
import tempfile

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from omnimix.backbones import Backbone, BackboneConfig, no_weight_decay
from omnimix.errors import ConfigError
from omnimix.recipes.common.optimisers import cosine, parameter_groups
from omnimix.recipes.common.training import AverageWeights, LastCheckpoint, precision
from omnimix.recipes.vision.recipe import VisionTrainingConfig


def test_cosine_rises_then_falls():
    factors = [cosine(step, total=100, warmup=0.1, floor=0.05) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx((1 + 0.05) / 2)
    assert cosine(0, total=5, warmup=0.0, floor=0.0) == 1.0


def test_parameters_that_say_so_do_not_decay():
    model = Backbone(BackboneConfig(dim=16, depth=2, pattern=["mamba2", "attention"]))
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, 0.3)}
    assert groups["decay"]["weight_decay"] == 0.3 and groups["no_decay"]["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for _, p in groups["no_decay"]["params"]}
    assert spared == no_weight_decay(model) - {names[id(frozen)]}
    kept = {names[id(p)] for _, p in groups["decay"]["params"]}
    assert kept and all(model.get_parameter(name).ndim > 1 for name in kept)
    assert len(spared) + len(kept) + 1 == len(names)


def test_weights_are_averaged_with_a_decay_that_grows():
    module = nn.Linear(3, 2)
    average = AverageWeights(0.5)
    expected = None
    for step in range(6):
        with torch.no_grad():
            module.weight.normal_()
        average.update(module)
        current = module.weight.detach().double().clone()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = current if expected is None else decay * expected + (1 - decay) * current
    torch.testing.assert_close(average.average[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_precision_is_what_was_named_or_what_pays(monkeypatch):
    monkeypatch.setattr("omnimix.recipes.common.training.native_bf16", lambda: True)
    assert precision("64-true", "cpu", 10) == "64-true"
    assert precision(None, "cuda", 10) == "bf16-mixed"
    assert precision(None, "cpu", 10) == "32-true"
    assert precision(None, "cpu", 10_000_000) == "bf16-mixed"
    monkeypatch.setattr("omnimix.recipes.common.training.native_bf16", lambda: False)
    assert precision(None, "cpu", 10_000_000) == "32-true"


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"warmup": 1.5}, {"ema": 1.0}, {"label_smoothing": -0.1}, {"mixup": -1.0}, {"weight_decay": -0.1}],
)
def test_impossible_numbers_raise(wrong):
    with pytest.raises(ConfigError, match=f"training.{next(iter(wrong))}"):
        VisionTrainingConfig(**wrong)


@pytest.mark.parametrize(
    ("code", "names", "said"),
    [
        (errno.ENOSPC, ("temporary", None, "last.part"), "last.part"),
        (errno.ENOSPC, (), tempfile.gettempdir()),
        (errno.EFBIG, (), "last.part"),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint_alone(tmp_path, monkeypatch, code, names, said):
    def save_checkpoint(path):
        path.write_bytes(b"half")
        raise OSError(code, "full", *names)

    (tmp_path / "last.ckpt").write_bytes(b"older")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)
    with pytest.raises(OSError, match=said):
        LastCheckpoint(tmp_path).save(trainer)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("last.ckpt", b"older")]
