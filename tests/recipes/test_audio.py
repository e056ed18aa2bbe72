"""`omnimix audio` from files to predictions; stopped and resumed on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import omnimix
from omnimix.__main__ import main
from omnimix.cli.shard import shard_folder
from omnimix.errors import ConfigError, MediaError
from omnimix.modalities.audio.files import read_audio
from omnimix.modalities.audio.mel import LogMel, MelConfig
from omnimix.modalities.common.encode import write_audio, write_video
from omnimix.recipes.audio.data import AudioAugment, AudioFolderData
from omnimix.recipes.audio.predict import Predictor
from omnimix.recipes.audio.preprocess import AudioPreprocess
from omnimix.recipes.audio.recipe import picture
from omnimix.recipes.audio.sounds import RATE, SECONDS, SOUNDS
from omnimix.recipes.common import synthetic
from omnimix.recipes.common.options import LoadingOptions
from omnimix.recipes.common.timeline import Moment, Scene, scenes

# Everything that draws random numbers is on: stochastic depth, masks, augmentation.
SMALL = ["--model.dim=16", "--model.depth=1", "--model.front.mel.bins=16", "--model.drop_path=0.3", "--threads=1"]
TINY = [
    *("--data.train=5", "--data.val=2", "--data.batch_size=12", *SMALL, "--model.order_blind_epochs=1"),
    *("--trainer.max_epochs=2", "--checkpoint_steps=2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the cache of generated sounds, and one finished run, runs/whole."""
    folder = tmp_path_factory.mktemp("audio")
    with pytest.MonkeyPatch.context() as patch:
        # Not XDG_CACHE_HOME, where the kernels are too.
        patch.setattr(synthetic, "cache_folder", lambda name: folder / "cache" / name)
        threads = torch.get_num_threads()
        assert main(["audio", "fit", "--name", "whole", "--runs", str(folder / "runs"), *TINY]) == 0
        yield folder
        torch.set_num_threads(threads)


def tone(hertz, seconds=0.4, rate=8000):
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)[None]


@pytest.fixture
def folder(tmp_path):
    """Sounds of two classes, of several lengths, rates, formats and numbers of channels."""
    for split, count in (("train", 6), ("val", 4)):
        for name, hertz in (("deep", 200), ("high", 900)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                rate, suffix = (8000, "wav") if i % 2 else (16000, "flac")
                wave = tone(hertz + 20 * i, 0.3 + 0.05 * i, rate).expand(1 + i % 2, -1)
                write_audio(tmp_path / "data" / split / name / f"{i}.{suffix}", wave, rate)
    return tmp_path / "data"


def fit_folder(root, *more):
    return main(
        [
            *("audio", "fit", "--name", "own", "--runs", str(root.parent / "runs"), "--config", "audio_folder"),
            *(f"--data.root={root}", "--data.rate=8000", "--data.workers=0", "--data.batch_size=4", *SMALL),
            *("--trainer.max_epochs=1", *more),
        ]
    )


def test_a_run_leaves_everything_in_its_folder(place):
    run = place / "runs" / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"val/acc1", "val/acc5", "val/loss", "train_seconds", "parameters", "baseline_seconds"} <= set(metrics)
    assert metrics["configuration"] == "audio_classification"
    assert metrics["baseline"] == "order unheard" and 0 <= metrics["baseline/acc1"] <= 1
    assert metrics["train_sounds"] == 60 and metrics["val_sounds"] == 24 and metrics["unreadable"] == {}
    with Image.open(run / "report.png") as image:
        assert image.width > 1000
    rows = list(csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows) and any(row["val/acc1"] for row in rows)


def test_killed_in_the_middle_of_an_epoch_and_resumed(place):
    """Final weights equal the uninterrupted run's, bit for bit."""
    runs = place / "runs"
    code = f"""
import os, pathlib
from omnimix.recipes.audio import recipe as audio
from omnimix.recipes.common import synthetic
synthetic.cache_folder = lambda name: pathlib.Path({str(place / "cache")!r}) / name
step = audio.AudioClassification.training_step
def dying(self, batch, index):
    if self.global_step == 7:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
audio.AudioClassification.training_step = dying
audio.fit(["--name", "killed", "--runs", {str(runs)!r}, *{TINY!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = runs / "killed"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert main(["audio", "fit", "--name", "killed", "--runs", str(runs), "--resume"]) == 0
    first, second = (load_file(r / "model.safetensors") for r in (runs / "whole", run))
    assert first.keys() == second.keys() and first
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_validate_repeats_the_numbers(place, capsys):
    run = place / "runs" / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    for command, split in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        assert main(["audio", command, "--run", str(run), "--json", "-"]) == 0
        [row] = json.loads(capsys.readouterr().out)
        assert row[f"{split}/acc1"] == pytest.approx(metrics["val/acc1"], abs=1e-6)
        assert row[f"{split}/loss"] == pytest.approx(metrics["val/loss"], abs=1e-4)


def test_predict_names_class_and_probability(place, tmp_path, capsys):
    more = tmp_path / "more"
    more.mkdir()
    write_audio(tmp_path / "a.wav", tone(300, 0.7, RATE), RATE)
    write_audio(more / "b.flac", tone(500, 2.0, 8000).expand(2, -1), 8000)
    frames = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    write_video(more / "c.mp4", frames, rate=8.0, audio=(tone(400, 1.0, RATE), RATE))
    (more / "d.flac").write_bytes((more / "b.flac").read_bytes()[:2000])
    words = ["audio", "predict", "--run", str(place / "runs" / "whole"), str(tmp_path / "a.wav"), str(more)]
    capsys.readouterr()
    assert main([*words, "--top", "2", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    good = [row for row in rows if row["class"] is not None]
    assert [(Path(row["file"]).name, row["rank"]) for row in good] == [
        (name, rank) for name in ("a.wav", "b.flac", "c.mp4") for rank in (1, 2)
    ]
    assert all(row["class"] in SOUNDS and 0 <= row["probability"] <= 1 for row in good)
    assert [row["file"] for row in rows if row["class"] is None] == [str(more / "d.flac")]
    details = omnimix.modalities.read_details(place / "runs" / "whole")
    wave = AudioPreprocess.from_dict(details["preprocess"]).load(tmp_path / "a.wav")
    assert wave.shape == (round(SECONDS * RATE),)
    with torch.no_grad():
        logits = omnimix.modalities.load_model(place / "runs" / "whole")(wave[None])
    assert good[0]["class"] == SOUNDS[int(logits.argmax())]
    assert main([*words, "--policy", "raise"]) == 2
    assert "d.flac" in capsys.readouterr().err
    assert main([*words[:4], str(tmp_path / "none.wav")]) == 2
    for typed, said in (
        ("--top=0", "top is 0"),
        ("--every=0", "every is 0"),
        (f"--json={more}", "is a folder; name a file in it"),
    ):
        assert main([*words, typed]) == 2
        assert said in capsys.readouterr().err
    assert main([*words, "--json", str(tmp_path / "new" / "rows.json")]) == 0
    assert len(json.loads((tmp_path / "new" / "rows.json").read_text())) == 4


def test_a_timeline_covers_the_recording(place, tmp_path, capsys):
    write_audio(tmp_path / "long.wav", torch.cat([tone(300, 2.0, RATE), tone(900, 1.7, RATE)], dim=1), RATE)
    write_audio(tmp_path / "short.wav", tone(300, 0.5, RATE), RATE)
    words = ["audio", "predict", "--timeline", "--run", str(place / "runs" / "whole"), "--json", "-"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]) == 0
    rows = json.loads(capsys.readouterr().out)
    for name, seconds in (("long.wav", 3.7), ("short.wav", 0.5)):
        found = [row for row in rows if row["file"].endswith(name)]
        assert found[0]["start"] == 0.0 and found[-1]["stop"] == pytest.approx(seconds)
        assert all(one["stop"] == two["start"] for one, two in pairwise(found))
        assert all(one["class"] != two["class"] for one, two in pairwise(found))
    # Without the option it is made of what is much longer than the model's sounds.
    words.remove("--timeline")
    assert main([*words, str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]) == 0
    mixed = json.loads(capsys.readouterr().out)
    assert mixed[1:] == [row for row in rows if row["file"].endswith("long.wav")]
    assert mixed[0]["file"].endswith("short.wav") and "start" not in mixed[0]
    assert main([*words, "--no-timeline", str(tmp_path / "long.wav"), str(tmp_path / "long.wav")]) == 0
    assert [row["rank"] for row in json.loads(capsys.readouterr().out)] == [1, 1]
    assert main([*words[:4], str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]) == 0
    shown = capsys.readouterr().out
    assert "predictions of" in shown and "timelines of" in shown


def test_windows_lie_around_what_they_say(place):
    """A stretch is what the window around its middle holds, however long the recording is."""
    predictor = Predictor(place / "runs" / "whole")
    wave = 0.1 * torch.randn(5 * RATE, generator=torch.Generator().manual_seed(0))
    heard = list(predictor.moments(wave, 2))
    size = round(SECONDS * RATE)
    assert len(heard) == -(-(len(wave) - size) // (size // 2)) + 1
    third = predictor.model(wave[size : 2 * size][None])[0].softmax(-1)
    torch.testing.assert_close(heard[2].probabilities, third.detach())
    assert heard[2].start < 1.5 * SECONDS < heard[2].stop


def test_scenes_put_together_what_is_alike():
    said = [
        Moment(start=at + 0.0, stop=at + 1.0, probabilities=torch.tensor([p, 1 - p]))
        for at, p in enumerate((0.9, 0.7, 0.2))
    ]
    first, second = scenes(said)
    assert first == Scene(start=0.0, stop=2.0, label=0, probability=first.probability, moments=2)
    assert second == Scene(start=2.0, stop=3.0, label=1, probability=second.probability, moments=1)
    assert (first.probability, second.probability) == pytest.approx((0.8, 0.8))
    assert list(scenes([])) == []


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_folder_with_unreadable_files(folder, capsys, policy):
    cut, empty = folder / "train" / "deep" / "2.flac", folder / "val" / "high" / "1.wav"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    empty.write_bytes(b"")
    code = fit_folder(folder, f"--data.policy={policy}", "--data.batch_size=6")
    captured = capsys.readouterr()
    if policy == "raise":
        assert code == 2 and captured.err.count("\n") == 1
        assert str(cut) in captured.err or str(empty) in captured.err
        return
    assert code == 0
    metrics = json.loads((folder.parent / "runs" / "own" / "metrics.json").read_text())
    assert sorted(metrics["unreadable"]) == sorted([str(cut), str(empty)])
    assert metrics["configuration"] == "audio_folder" and metrics["val_sounds"] == 7 and "baseline" not in metrics


def test_too_many_unreadable_files_stop_the_run(folder, capsys):
    for file in (folder / "train" / "deep").iterdir():
        file.write_bytes(b"RIFF")
    assert fit_folder(folder, "--data.max_unreadable=0.05") == 2
    assert "data.max_unreadable" in capsys.readouterr().err


def test_clips_of_any_length_train_packed(folder):
    assert fit_folder(folder, "--data.seconds=null", "--model.mixer=gla", "--model.order_blind_epochs=1") == 0
    run = folder.parent / "runs" / "own"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val_sounds"] == 8 and "baseline/acc1" in metrics
    file = folder / "val" / "deep" / "3.wav"
    [[row], _] = Predictor(run).heard([file])
    wave = read_audio(file, rate=8000)[0]
    assert wave.shape == (1, round(0.45 * 8000))
    with torch.no_grad():
        logits = omnimix.modalities.load_model(run)(wave)[0]
    assert row["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_shards_give_the_same_samples(folder):
    shard_folder(folder, folder.parent / "shards", kind="audio", samples=5)
    options = {"rate": 8000, "loading": LoadingOptions(workers=0), "seconds": 0.4}
    sets = {}
    for root in (folder, folder.parent / "shards"):
        data = AudioFolderData(root=str(root), **options)
        data.setup("fit")
        assert data.preprocess.classes == ("deep", "high")
        samples = [data.val_set[0, i] for i in range(len(data.val_set))]
        sets[root.name] = sorted((s["label"], tuple(s["audio"].tolist())) for s in samples)
    assert sets["data"] == sets["shards"] and len(sets["data"]) == 8


def test_speech_commands_as_it_comes(tmp_path):
    for name in ("yes", "no", "_background_noise_"):
        (tmp_path / name).mkdir()
        for i in range(3):
            write_audio(tmp_path / name / f"{i}.wav", tone(300 + 100 * i), 8000)
    (tmp_path / "validation_list.txt").write_text("yes/0.wav\nno/0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/2.wav\n")
    data = AudioFolderData(root=str(tmp_path), loading=LoadingOptions(workers=0))
    data.setup("fit")
    assert data.preprocess.classes == ("no", "yes")
    held = {
        split: [(Path(s.source.name(i)).relative_to(tmp_path).as_posix(), s.source.label(i)) for i in range(len(s))]
        for split, s in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set))
    }
    assert held == {
        "train": [("no/1.wav", 0), ("yes/1.wav", 1), ("yes/2.wav", 1)],
        "val": [("no/0.wav", 0), ("yes/0.wav", 1)],
        "test": [("no/2.wav", 0)],
    }
    assert data.val_set[0, 1]["audio"].shape == (16000,)
    (tmp_path / "testing_list.txt").write_text("no/7.wav\n")
    with pytest.raises(ConfigError, match=r"no/7\.wav"):
        AudioFolderData(root=str(tmp_path))
    (tmp_path / "testing_list.txt").write_text("no/2.wav\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"testing_list\.txt' is no text in UTF-8"):
        AudioFolderData(root=str(tmp_path))
    (tmp_path / "yes").rename(tmp_path / ".yes")
    (tmp_path / "testing_list.txt").unlink()
    (tmp_path / "validation_list.txt").write_text("no/0.wav\n")
    with pytest.raises(ConfigError, match="has one class, 'no'"):
        AudioFolderData(root=str(tmp_path))


def test_kept_waves_are_read_once(folder, monkeypatch):
    data = AudioFolderData(root=str(folder), rate=8000, loading=LoadingOptions(workers=0, keep=True))
    data.setup("fit")
    first = data.train_set[0, 3]["audio"]
    monkeypatch.setattr(AudioPreprocess, "read", None)
    assert torch.equal(data.train_set[0, 3]["audio"], first)
    assert not torch.equal(data.train_set[1, 3]["audio"], first)
    with pytest.raises(ConfigError, match="workers"):
        AudioFolderData(root=str(folder), loading=LoadingOptions(workers=1, keep=True))


def test_clips_are_cut_or_filled_up():
    preprocess = AudioPreprocess(classes=("a",), rate=10, seconds=1.0)
    wave = torch.arange(1.0, 16)
    assert preprocess.fit(wave).tolist() == list(range(3, 13))
    assert preprocess.fit(wave, 0.0).tolist() == list(range(1, 11))
    assert preprocess.fit(wave, 1.0).tolist() == list(range(6, 16))
    assert preprocess.fit(wave[:4]).tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert preprocess.fit(wave[:4], 1.0).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    whole = AudioPreprocess(classes=("a",), rate=10, seconds=None)
    assert whole.fit(wave) is wave
    assert AudioPreprocess.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_augmentation_stays_within_its_bounds():
    preprocess = AudioPreprocess(classes=("a",), rate=8000, seconds=1.0)
    wave = tone(440, 1.0)[0]
    shift = AudioAugment(place=False, shift=0.1, gain=0.0, noise=None)
    moved = [shift(wave, preprocess, seed) for seed in range(20)]
    starts = [int(m.nonzero()[0]) for m in moved]
    assert max(starts) > 200 and max(starts) <= 801 and len({m.sum().item() for m in moved}) == 20
    gain = AudioAugment(place=False, gain=6.0, noise=None)
    louder = [20 * float((gain(wave, preprocess, seed).norm() / wave.norm()).log10()) for seed in range(30)]
    assert -6 <= min(louder) < -3 and 3 < max(louder) <= 6
    noisy = AudioAugment(place=False, gain=0.0, noise=20.0)
    ratios = [20 * float((wave.norm() / (noisy(wave, preprocess, seed) - wave).norm()).log10()) for seed in range(30)]
    assert 19 < min(ratios) < 35 and 45 < max(ratios) < 61
    assert torch.equal(noisy(wave, preprocess, 5), noisy(wave, preprocess, 5))


def test_pictures_of_sounds_have_low_tones_below():
    mel = LogMel(MelConfig.whisper(rate=8000, bins=16))
    image = picture(mel(torch.cat([tone(150), tone(3000)], dim=1))[0])
    assert image.shape == (3, 16, 80)
    bright = image.sum(0)
    assert bright[8:, :38].max() > bright[:8, :38].max() and bright[:8, 42:].max() > bright[8:, 42:].max()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--model.front=frame", "did you mean 'frames'"),
        ("--data.seconds=0.5", "data.seconds is 0.5"),
        ("--data.train=0", "data.train is 0"),
        ("--model.front.mel.bims=4", "MelConfig has no field 'bims'; did you mean 'bins'?"),
        (
            "--model.front.patch=4",
            "front 'frames' has no option 'patch'; 'patch' is one of 'patches': add --model.front",
        ),
        ("--data.augment.gain=-1", "augment.gain is -1.0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    assert main(["audio", "fit", typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"no sound")
    with pytest.raises(MediaError, match=r"x\.wav"):
        AudioPreprocess(classes=("a",), rate=8000, seconds=None).load(tmp_path / "x.wav")
