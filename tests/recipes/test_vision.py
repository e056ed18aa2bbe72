"""`omnimix vision` from a configuration to predictions; stopped and resumed on the way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import omnimix
from omnimix.__main__ import main

# Everything that draws random numbers is on: stochastic depth, mixing, augmentation.
TINY = [
    *("--model.dim=16", "--model.depth=2", "--model.patch=4", "--model.drop_path=0.3"),
    *("--model.training.mixup=0.3", "--model.training.cutmix=0.5", "--data.batch_size=24"),
    *("--trainer.max_epochs=2", "--trainer.limit_train_batches=7", "--checkpoint_steps=2"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Processes that must agree bit for bit share the order in which they add."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one finished run, "whole"."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["vision", "fit", "--name", "whole", "--runs", str(folder), *TINY]) == 0
    torch.set_num_threads(threads)
    return folder


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_weights(run, other) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys() and first
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_a_run_leaves_everything_in_its_folder(runs):
    run = runs / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"val/acc1", "val/acc5", "val/loss", "train_seconds", "parameters", "configuration", "mixer"} <= set(metrics)
    assert metrics["configuration"] == "vision_classification" and metrics["mixer"] == "gla"
    assert metrics["val_images"] == 359 and metrics["epochs"] == 2 and metrics["unreadable"] == {}
    assert metrics["parameters"] == sum(w.numel() for w in weights(run).values())
    with Image.open(run / "report.png") as image:
        assert image.width > 1000
    rows = list(csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows) and any(row["val/acc1"] for row in rows)
    assert list((run / "logs" / "version_0").glob("events.*"))
    assert "overwrite" not in (run / "config.yaml").read_text()


def test_checkpoints_load_without_running_code(runs):
    for name in ("last.ckpt", "best.ckpt"):
        state = torch.load(runs / "whole" / "checkpoints" / name, weights_only=True)
        assert state["model"]["head"]["classes"] == 10
    # The averaged weights are what is saved, in the checkpoint and as the model.
    last = torch.load(runs / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    saved = weights(runs / "whole")
    assert all(torch.equal(last["state_dict"][f"model.{name}"], saved[name]) for name in saved)
    assert any(not torch.equal(last["current_model_state"][f"model.{name}"], saved[name]) for name in saved)


def test_an_older_run_is_safe(runs, capsys):
    before = weights(runs / "whole")
    assert main(["vision", "fit", "--name", "whole", "--runs", str(runs), *TINY]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (runs / "other").mkdir()
    (runs / "other" / "thesis.tex").write_text("years of work")
    assert main(["vision", "fit", "--name", "other", "--runs", str(runs), "--overwrite", *TINY]) == 2
    assert (runs / "other" / "thesis.tex").is_file()
    assert main(["vision", "fit", "--name", "whole", "--runs", str(runs), "--overwrite", "--model.mixer=nix"]) == 2
    # Found at the first step only, when the new run's folder is there.
    config = ["--model.backbone.residual", "adaln", "--model.backbone.residual.condition", "4"]
    assert main(["vision", "fit", "--name", "whole", "--runs", str(runs), "--overwrite", *TINY, *config]) == 2
    assert "is as it was" in capsys.readouterr().out
    # A new one that fails there leaves nothing that would block the next command of its name.
    assert main(["vision", "fit", "--name", "new", "--runs", str(runs), *TINY, *config]) == 2
    assert sorted(path.name for path in runs.iterdir()) == ["other", "whole"]
    after = weights(runs / "whole")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_older_run_is_resumed_where_its_successor_made_no_step(runs, capsys):
    run = runs / "kept"
    shutil.copytree(runs / "whole", run)
    (run / "model.safetensors").unlink()
    run.rename(runs / ".kept.older")
    # What is left of a run that was killed while its data was read.
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((runs / "whole" / "config.yaml").read_text().replace("dim: 16", "dim: 32"))
    assert main(["vision", "fit", "--name", "kept", "--runs", str(runs), "--resume"]) == 0
    assert "was stopped before its first step" in capsys.readouterr().out
    assert_same_weights(runs / "whole", run)
    shutil.rmtree(run)
    (runs / ".kept.lock").unlink()


def test_killed_in_the_middle_of_an_epoch_and_resumed(runs):
    """Final weights equal the uninterrupted run's, bit for bit."""
    code = f"""
import os, sys, torch
torch.set_num_threads(1)
from omnimix.recipes.vision import recipe as vision
step = vision.VisionClassification.training_step
def dying(self, batch, index):
    if self.global_step == 11:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
vision.VisionClassification.training_step = dying
vision.fit(["--name", "killed", "--runs", {str(runs)!r}, *{TINY!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = runs / "killed"
    assert (run / "checkpoints" / "last.ckpt").is_file() and not (run / "model.safetensors").exists()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10
    assert main(["vision", "fit", "--name", "killed", "--runs", str(runs), "--resume"]) == 0
    assert_same_weights(runs / "whole", run)


def test_ctrl_c_saves_and_says_how_to_go_on(runs, capsys, monkeypatch):
    from omnimix.recipes.vision.recipe import VisionClassification

    step, before = VisionClassification.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, batch, index):
        if self.global_step == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(VisionClassification, "training_step", interrupted)
        assert main(["vision", "fit", "--runs", str(runs), *TINY]) == 130
    assert f"omnimix vision fit --name vision --runs {runs} --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before
    assert main(["vision", "fit", "--runs", str(runs), "--resume"]) == 0
    assert_same_weights(runs / "whole", runs / "vision")
    # Curves and seconds reach back before the stop.
    metrics = json.loads((runs / "vision" / "metrics.json").read_text())
    assert metrics["epochs"] == 2 and metrics["configuration"] == "vision_classification"


def test_a_state_that_cannot_be_resumed_is_named(runs, capsys):
    shutil.copytree(runs / "whole", runs / "damaged")
    again = ["vision", "fit", "--name", "damaged", "--runs", str(runs), "--resume"]
    before = (runs / "damaged" / "config.yaml").read_text()
    assert main([*again, "--model.dim=8"]) == 2
    assert "last.ckpt': it is of another model" in capsys.readouterr().err
    assert (runs / "damaged" / "config.yaml").read_text() == before
    last = runs / "damaged" / "checkpoints" / "last.ckpt"
    os.truncate(last, 1000)
    assert main(again) == 2
    error = capsys.readouterr().err
    assert "last.ckpt': it is damaged; start anew with --overwrite" in error and error.count("\n") == 1


def test_another_seed_is_another_run(runs):
    short = ["--trainer.max_epochs=1", "--seed_everything=1"]
    assert main(["vision", "fit", "--name", "seed", "--runs", str(runs), *TINY, *short]) == 0
    first, second = weights(runs / "whole"), weights(runs / "seed")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_validate_repeats_the_numbers(runs, capsys):
    run = runs / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    for command, split in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        assert main(["vision", command, "--run", str(run), "--json", "-"]) == 0
        [row] = json.loads(capsys.readouterr().out)
        assert row[f"{split}/acc1"] == pytest.approx(metrics["val/acc1"], abs=1e-6)


def test_predict_names_class_and_probability(runs, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 30, 20), dtype=np.uint8)
    (tmp_path / "more").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels[1]).convert("RGB").save(tmp_path / "more" / "b.jpg")
    (tmp_path / "more" / "c.jpg").write_bytes((tmp_path / "more" / "b.jpg").read_bytes()[:300])
    words = ["vision", "predict", "--run", str(runs / "whole"), str(tmp_path / "a.png"), str(tmp_path / "more")]
    assert main([*words, "--top", "3", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    good = [row for row in rows if row["class"] is not None]
    assert [row["rank"] for row in good] == [1, 2, 3, 1, 2, 3]
    assert all(row["class"] in "0123456789" and 0 <= row["probability"] <= 1 for row in good)
    assert [row["file"] for row in rows if row["class"] is None] == [str(tmp_path / "more" / "c.jpg")]
    model = omnimix.modalities.load_model(runs / "whole")
    details = omnimix.modalities.read_details(runs / "whole")
    from omnimix.recipes.vision.preprocess import ImagePreprocess

    with torch.no_grad():
        logits = model(ImagePreprocess.from_dict(details["preprocess"]).load(tmp_path / "a.png")[None])
    assert good[0]["class"] == str(int(logits.argmax()))
    assert main([*words, "--policy", "raise"]) == 2
    assert "c.jpg" in capsys.readouterr().err
    assert main(["vision", "predict", "--run", str(runs / "whole"), str(tmp_path / "none.png")]) == 2
    assert main(["vision", "predict", "--run", str(runs / "nowhere"), str(tmp_path / "a.png")]) == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--model.mixer=glaa", "unknown mixer 'glaa'; did you mean 'gla'?"),
        ("--model.mxer=gla", "did you mean '--model.mixer'?"),
        ("--model.mixers.gla.haeds=2", "did you mean 'heads'"),
        ("--model.mixers.gla.heads=5", "heads is 5; it must divide"),
        ("--data=DigitData", "did you mean 'DigitsData'"),
        ("--data.holdout=2", "holdout is 2.0"),
        ("--config=vision_clasification", "no configuration 'vision_clasification'"),
        ("--name=../up", "name is '../up'"),
        ("--threads=0", "threads is 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    assert main(["vision", "fit", typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "patch"), [(4, 2), (8, 2), (15, 2), (28, 2), (32, 4), (64, 8), (224, 16), (384, 32)])
def test_patches_fit_the_image(size, patch):
    from omnimix.recipes.vision.recipe import patch_for

    assert patch_for(size) == patch


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_folder_with_a_truncated_file(tmp_path, capsys, policy):
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                file = tmp_path / "data" / split / name / f"{i}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    broken = tmp_path / "data" / "train" / "dog" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    typed = [
        *("vision", "fit", "--name", "folder", "--runs", str(tmp_path / "runs"), "--config", "vision_folder"),
        *(f"--data.root={tmp_path / 'data'}", f"--data.policy={policy}", "--data.size=16", "--data.batch_size=6"),
        *("--data.workers=1", "--model.dim=16", "--model.depth=1", "--trainer.max_epochs=1"),
        "--model.mixer=gla,attention+mamba2",
    ]
    code = main(typed)
    captured = capsys.readouterr()
    if policy == "raise":
        assert code == 2
        assert str(broken) in captured.err and captured.err.count("\n") == 1
        return
    assert code == 0
    assert f"skipped: {broken}" in captured.err
    metrics = json.loads((tmp_path / "runs" / "folder" / "metrics.json").read_text())
    assert list(metrics["unreadable"]) == [str(broken)]
    assert metrics["configuration"] == "vision_folder" and metrics["val_images"] == 6
