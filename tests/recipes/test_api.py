"""Whole jobs in Python: `omnimix.fit`, and the run that it returns."""

import json
import logging
import os
import signal
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

import omnimix as om
from omnimix.errors import CheckpointError, ConfigError, UnknownName
from omnimix.recipes.common.training import Interrupted

TINY = {"dim": 16, "depth": 1, "accelerator": "cpu", "threads": 1}
DIGITS = {**TINY, "limit_train_batches": 3, "max_epochs": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Folders of dark and of light pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        file = folder / ("dark", "light")[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 + 180 * (i % 2) + i,) * 3).save(file)
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory) -> om.Run:
    """Of a model that tells them apart."""
    place = tmp_path_factory.mktemp("runs")
    options = {**TINY, "mixer": "linear", "max_epochs": 8, "batch_size": 4, "lr": 1e-2, "size": 16, "workers": 0}
    return om.fit("vision", photos, runs=place, name="shades", mixup=0.0, cutmix=0.0, ema=0.0, **options)


def test_a_folder_becomes_a_model_that_is_used(run: om.Run, photos: Path):
    assert (run.path / "README.md").read_text().startswith("---\nlibrary_name: omnimix")
    assert run.metrics["val_images"] == 4 and run.report.is_file() and run.metrics["mixer"] == "linear"
    best = run.predict(photos / "light" / "1.png")
    assert best[0].label == "light"
    assert run.predictor.classes == ("dark", "light")
    assert run.evaluate()["val/acc1"] == pytest.approx(run.metrics["val/acc1"], abs=1e-6)
    again = om.Run(run.path)
    assert again.metrics == run.metrics and again.predict(photos / "light" / "1.png") == best


def test_a_notebook_shows_the_report(run: om.Run):
    shown = run._repr_html_()
    assert "val/acc1" in shown and "data:image/png;base64," in shown
    assert run._repr_png_()[:4] == b"\x89PNG"


def test_nothing_of_the_process_is_changed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    levels = [logging.getLogger(name).level for name in ("omnimix", "lightning", "lightning.pytorch")]
    before = dict(os.environ), torch.get_num_threads(), os.getcwd()
    for name in ("one", "two"):
        om.fit("vision", name=name, runs=tmp_path, **DIGITS)
    assert (dict(os.environ), torch.get_num_threads(), os.getcwd()) == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert levels == [logging.getLogger(name).level for name in ("omnimix", "lightning", "lightning.pytorch")]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_in_a_thread_with_callbacks_and_tensors(tmp_path: Path):
    class Seen(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *_: object) -> None:
            self.steps += 1

    seen, found = Seen(), []
    tensors = {"train_images": torch.rand(12, 1, 8, 8), "train_labels": torch.arange(12) % 3}
    tensors |= {"val_images": torch.rand(6, 1, 8, 8), "val_labels": torch.arange(6) % 3}

    def work() -> None:
        options = {**TINY, "max_epochs": 2, "trainer": {"gradient_clip_val": 0.5}, "batch_size": 4}
        found.append(om.fit("vision", tensors, runs=tmp_path, callbacks=seen, seed=3, **options))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen.steps == 6 and found[0].metrics["seed"] == 3
    assert found[0].predict(torch.rand(1, 8, 8))[0].label in "012"
    assert "gradient_clip_val: 0.5" in (tmp_path / "vision" / "config.yaml").read_text()


def test_text(tmp_path: Path):
    (tmp_path / "book.txt").write_text("a line of the book\n" * 4000)
    options = {**TINY, "mixer": "gla", "max_steps": 2, "length": 32, "tokenizer": "bytes", "cache": tmp_path}
    run = om.fit("text", tmp_path / "book.txt", runs=tmp_path, val_tokens=100, training={"lr": 1e-3}, **options)
    assert run.evaluate().keys() >= {"val/bits_per_byte"} and run.metrics["steps"] == 2
    with pytest.raises(ConfigError, match="language model"):
        run.predict("text")
    with pytest.raises(UnknownName, match="split 'test'"):
        run.evaluate("test")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"task": "visions"}, UnknownName, "did you mean 'vision'"),
        ({"mixr": "gla"}, UnknownName, "did you mean 'mixer'"),
        ({"mixer": "gal"}, UnknownName, "'gal'"),
        ({"data": "./nothing"}, ConfigError, "no such folder"),
        ({"data": 3}, ConfigError, "data is a int; it must be a path"),
        ({"data": pl.LightningDataModule()}, ConfigError, "lightning's Trainer"),
        ({"dim": object()}, ConfigError, "plain values"),
        ({"max_epochs": "many"}, ConfigError, "max_epochs"),
    ],
)
def test_mistakes(given, error, message, tmp_path: Path):
    with pytest.raises(error, match=message):
        om.fit(**{"task": "vision", "runs": tmp_path, **DIGITS} | given)


def test_a_run_that_is_there_is_kept_and_resumed(tmp_path: Path, monkeypatch):
    from omnimix.recipes.vision.recipe import VisionClassification

    step = VisionClassification.training_step

    def stopping(self, batch, index):
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, index)

    monkeypatch.setattr(VisionClassification, "training_step", stopping)
    options = DIGITS | {"max_epochs": 3}
    with pytest.raises(Interrupted, match="resume=True"):
        om.fit("vision", runs=tmp_path, **options)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="exists"):
        om.fit("vision", runs=tmp_path, **options)
    assert om.fit("vision", runs=tmp_path, resume=True).metrics["epochs"] == 3
    assert om.fit("vision", runs=tmp_path, overwrite=True, **DIGITS).metrics["epochs"] == 1


def test_runs_that_are_none(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        om.Run(tmp_path / "nothing")


def test_corrupt_numbers(run: om.Run, tmp_path: Path, monkeypatch):
    (tmp_path / "metrics.json").write_text("{")
    monkeypatch.setattr(run._folder, "metrics", tmp_path / "metrics.json")
    with pytest.raises(CheckpointError, match="corrupt"):
        _ = run.metrics
    (tmp_path / "metrics.json").write_text(json.dumps({"a": 1}))
    assert run.metrics == {"a": 1}
