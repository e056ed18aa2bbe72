"""The front of a sound model on the command line, in files, and fitted to the sounds."""

import shlex

import pytest
import yaml

from omnimix.__main__ import main
from omnimix.backbones import BackboneConfig
from omnimix.backbones.serialization import to_dict
from omnimix.modalities.audio.fronts import FrameFrontConfig, WaveFrontConfig
from omnimix.modalities.audio.mel import MelConfig
from omnimix.recipes.audio.recipe import AudioClassification
from omnimix.recipes.common.migration import migrate


def front(capsys, typed: str) -> dict:
    """The front that a command line stands for."""
    with pytest.raises(SystemExit) as stop:
        main(["audio", "fit", *shlex.split(typed), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["front"]


def test_the_front_is_a_part_with_options_of_its_own(tmp_path, capsys):
    frames = front(capsys, "")
    assert frames["type"] == "frames" and frames["mel"] | {"bins": 64, "std": 0.4, "log": "whisper"} == frames["mel"]
    patches = front(capsys, "--model.front.patch 8 --model.front patches --model.front.mel.bins 32")
    assert patches["patch"] == [8, 8] and patches["mel"] == frames["mel"] | {"bins": 32}
    # In whatever form it is said, and after another front was named.
    file = tmp_path / "own.yaml"
    file.write_text("model:\n  front: {type: patches, patch: 8, mel: {bins: 32}}\n")
    assert front(capsys, f"--config {file}") == patches
    assert front(capsys, "--model.front '{type: PatchFrontConfig, patch: 8, mel: {bins: 32}}'") == patches
    assert front(capsys, f"--config {file} --model.front frames") == frames
    assert front(capsys, "--model.front wave --model.front.channels 3") == to_dict(WaveFrontConfig(channels=3))
    masks = front(capsys, "--config audio_folder --data.root here")
    assert masks["mel"]["bins"] == 80 and masks["augment"] == frames["augment"] | {
        "time_masks": 2, "time_width": 20, "frequency_masks": 2, "frequency_width": 15
    }  # fmt: skip


@pytest.mark.parametrize(("rate", "seconds"), [(16_000, 1.2), (8000, None), (11_025, 2.0), (44_100, 0.5)])
def test_a_front_is_fitted_to_the_sounds(rate, seconds):
    backbone = BackboneConfig(dim=8, depth=1, scan="bidirectional")
    for name in ("frames", "patches", "wave"):
        model = AudioClassification(backbone=backbone, front=name, sounds=(rate, seconds, 3))
        config = model.model.config.audio
        assert config.rate == rate and config.front.type == name and model.mel.rate == rate
        assert (model.mel.window, model.mel.hop) == (rate // 40, round(rate / 100))
        if name == "patches":
            assert config.front.frames == model.mel.frames(round((seconds or 10) * rate))
    own = FrameFrontConfig(mel=MelConfig.whisper(rate=8000, bins=8), positions="none")
    model = AudioClassification(backbone=backbone, front=own, sounds=(8000, 1.0, 3))
    assert model.model.config.audio.front == own


def test_what_0_1_said_of_a_front_is_the_same_front(tmp_path, capsys):
    seen = {"bins": 40, "step": 12.5, "patch": [4, 8], "positions": None, "time_masks": 0, "time_width": 9}
    file = tmp_path / "old.yaml"
    for name in ("frames", "patches", "wave"):
        file.write_text(yaml.safe_dump({"model": {"front": name, "spectrogram": seen}}))
        found = front(capsys, f"--config {file}")
        assert found["type"] == name
        if name != "wave":
            assert (found["mel"]["bins"], found["mel"]["hop"], found["augment"]["time_width"]) == (40, 200, 9)
            assert found["augment"]["time_masks"] == 0 and found["augment"]["frequency_masks"] == 1
        if name == "patches":
            assert found["patch"] == [4, 8] and found["positions"] == "factorised"
    assert migrate({"model": {"spectrogram": {"bins": 8}}}) == {"model": {"front": {"mel": {"bins": 8}}}}
