"""Options and callbacks of Lightning's trainer that people use, and fits in several threads."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from omnimix.__main__ import main
from omnimix.errors import ConfigError
from omnimix.recipes.common.cli import RecipeCLI
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.recipes.vision.recipe import VisionClassification

SMALL = (
    "vision fit --threads 1 --model.dim 16 --model.depth 1 --trainer.max_epochs 1 --trainer.limit_train_batches 2"
).split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_validation_the_model_is_saved(here, capsys):
    assert main([*SMALL, "--trainer.limit_val_batches=0"]) == 0
    run = here / "runs" / "vision"
    assert (run / "model.safetensors").is_file() and (run / "report.png").is_file()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val_images"] == 0 and "val/acc1" not in metrics
    capsys.readouterr()
    assert main(["vision", "validate", "--run", "vision"]) == 2
    assert "nothing is evaluated; add --trainer.limit_val_batches" in capsys.readouterr().err
    assert main(["vision", "validate", "--run", "vision", "--trainer.limit_val_batches=1.0"]) == 0


def test_overfitting_repeats_the_same_batches(here, monkeypatch):
    seen = []
    step = VisionClassification.training_step

    def spy(self, batch, index):
        seen.append(batch["label"].tolist())
        return step(self, batch, index)

    monkeypatch.setattr(VisionClassification, "training_step", spy)
    assert main([*SMALL, "--trainer.overfit_batches=2", "--trainer.max_epochs=3"]) == 0
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:]


def test_nothing_is_saved_on_the_way_where_that_is_switched_off(here):
    assert main([*SMALL, "--trainer.enable_checkpointing=false"]) == 0
    assert not list(here.rglob("*.ckpt")) and (here / "runs/vision/model.safetensors").is_file()


def test_callbacks_of_a_user_next_to_ours(here, capsys):
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val/loss", "dirpath": "own", "filename": "lowest"},
        },
        {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"},
    ]
    Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    assert main([*SMALL, "--config", "callbacks.yaml"]) == 0
    assert sorted(path.name for path in here.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt", "lowest.ckpt"]


def test_what_lightning_refuses_is_an_error_of_ours(here, capsys):
    assert main([*SMALL, "--trainer.limit_val_batches=0.00001"]) == 2
    assert "error: trainer: You requested to check" in capsys.readouterr().err


def trainer(folder, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, max_epochs=1, callbacks=[TQDMProgressBar()], **quiet, **options)


def loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("named", [True, False])
def test_a_module_trains_without_a_datamodule(tmp_path, named):
    pairs = [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]
    batches = loader([{"image": image, "label": label} for image, label in pairs] if named else pairs)
    module = VisionClassification(backbone=VisionClassification(classes=4).model.config.backbone, classes=4)
    fitting = trainer(tmp_path)
    fitting.fit(module, batches, batches)
    assert fitting.global_step == 3 and float(fitting.callback_metrics["val/loss"]) > 0
    with pytest.raises(ConfigError, match="it must be a pair, or a dict with 'image' and 'label'"):
        trainer(tmp_path).validate(module, loader([{"pixels": pairs[0][0]}]))
    with pytest.raises(ConfigError, match="the learning rate's schedule needs an end"):
        endless = pl.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
        endless.fit(module, batches)


def test_a_language_model_trains_without_a_datamodule(tmp_path):
    module = TextGeneration(vocab_size=32)
    ids = loader([{"tokens": torch.randint(0, 32, (2, 9))} for _ in range(2)])
    fitting = trainer(tmp_path, limit_val_batches=0)
    fitting.fit(module, ids, ids)
    assert fitting.global_step == 2
    with pytest.raises(ConfigError, match="count no bytes"):
        trainer(tmp_path).validate(module, ids)


def test_fits_in_threads_stay_in_the_folder_that_they_were_started_in(here, monkeypatch):
    moved = []
    change = os.chdir

    def noted(path):
        moved.append(str(path))
        change(path)

    monkeypatch.setattr(os, "chdir", noted)
    Path("own.yaml").write_text(
        yaml.safe_dump({"trainer": {"limit_val_batches": 1}, "model": {"training": {"ema": 0}}})
    )
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda n: main([*SMALL, "--config", "own.yaml", "--name", n]), "ab"))
    assert codes == [0, 0] and moved == []
    assert sorted(path.parent.name for path in here.rglob("model.safetensors")) == ["a", "b"]


def test_a_run_stays_where_it_was_started(here, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    begin = RecipeCLI.before_instantiate_classes

    def moving(self):
        os.chdir(elsewhere)
        begin(self)

    monkeypatch.setattr(RecipeCLI, "before_instantiate_classes", moving)
    assert main(SMALL) == 0
    assert (here / "runs/vision/model.safetensors").is_file() and not list(elsewhere.iterdir())
