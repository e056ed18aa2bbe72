"""`omnimix.load`: trained models in Python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import omnimix as om
from omnimix.errors import CheckpointError, ConfigError, MediaError, UnsupportedShape
from omnimix.recipes.vision.predict import predict_files

from .conftest import CLASSES


def test_an_image_is_the_same_however_it_is_given(saved: Path):
    predictor = om.load(saved / "image")
    assert predictor.classes == tuple(CLASSES)
    path = saved / "images" / "one.png"
    opened = Image.open(path).convert("RGB")
    array = np.array(opened)
    given = [path, str(path), path.read_bytes(), opened, array, torch.from_numpy(array).permute(2, 0, 1)]
    found = predictor.predict(given, top=3)
    assert found == predictor.predict(given, top=3, batch_size=1) or all(
        one[0].probability == pytest.approx(found[0][0].probability, abs=1e-6) for one in found
    )
    best = found[0]
    assert [p.label for p in best] == [CLASSES[p.index] for p in best] and len({p.label for p in best}) == 3
    assert sum(p.probability for p in best) == pytest.approx(1)
    assert best[0].probability >= best[1].probability >= best[2].probability
    [row] = predict_files(saved / "image", [path])
    assert (row["class"], row["probability"]) == (best[0].label, pytest.approx(best[0].probability, abs=1e-6))


def test_one_gives_one_and_many_give_many(saved: Path):
    predictor = om.load(saved / "image")
    path = saved / "images" / "one.png"
    assert isinstance(predictor.predict(path)[0], om.Prediction)
    for many in (saved / "images", [path, path], iter([path, path]), (path, path)):
        found = predictor.predict(many)
        assert len(found) == 2 and all(isinstance(one[0], om.Prediction) for one in found)
    assert predictor.predict([]) == []


def test_videos(saved: Path):
    predictor = om.load(saved / "video")
    frames = torch.randint(0, 255, (4, 3, 20, 24), dtype=torch.uint8)
    one, two = predictor.predict([frames, frames.float() / 255])
    assert one[0].label == two[0].label
    assert one[0].probability == pytest.approx(two[0].probability, abs=1e-5)
    arrays = predictor.predict(frames.permute(0, 2, 3, 1).numpy())
    assert arrays[0].probability == pytest.approx(one[0].probability, abs=1e-5)
    assert predictor.predict(saved / "clip.mp4")[0].label in CLASSES
    with pytest.raises(UnsupportedShape, match="frames of a video"):
        predictor.predict(torch.zeros(3, 20, 24))


def test_audio_of_several_lengths(saved: Path):
    predictor = om.load(saved / "audio")
    files = [saved / "one.wav", saved / "two.wav"]
    waves = [om.read_audio(file)[0] for file in files]
    together, alone = predictor.predict(files), [predictor.predict(wave) for wave in waves]
    for one, other in zip(together, alone, strict=True):
        assert one[0].label == other[0].label
        assert one[0].probability == pytest.approx(other[0].probability, abs=1e-4)
    with pytest.raises(MediaError, match="cannot use inputs"):
        predictor.predict(torch.full((1000,), torch.nan))
    with pytest.raises(UnsupportedShape, match="audio is floating point"):
        predictor.predict(torch.zeros(100, dtype=torch.int16))


def test_a_language_model_comes_with_its_tokenizer(saved: Path):
    generator = om.load(saved / "text")
    assert isinstance(generator, om.TextGenerator)
    assert len(generator.generate(["ab"])) == 1


def test_a_run_is_found_by_its_name(saved: Path, tmp_path: Path, monkeypatch):
    run = tmp_path / "runs" / "mine"
    run.parent.mkdir()
    run.symlink_to(saved / "image")
    monkeypatch.chdir(tmp_path)
    assert om.load("runs/mine").classes == om.load(run).classes
    with pytest.raises(CheckpointError, match="nothing"):
        om.load("nothing")


def test_what_cannot_be_predicted(saved: Path, tmp_path: Path):
    predictor = om.load(saved / "image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a directory without images"):
        predictor.predict(tmp_path / "empty")
    for name in ("top", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            predictor.predict(saved / "images", **{name: 0})
    with pytest.raises(MediaError, match=r"none\.png"):
        predictor.predict("none.png")
    with pytest.raises(ConfigError, match="torch cannot use here"):
        om.load(saved / "image", device="nothing")
