"""Writing videos: colours, what cannot be written, and no file where that fails."""

import pytest
import torch

from omnimix.errors import ConfigError, UnsupportedShape
from omnimix.modalities import Uniform, VideoReader, read_audio, read_clip, write_audio, write_video

from .decoder_stress import barcodes, numbers_in


def test_colours_survive(tmp_path):
    colours = torch.tensor([[220, 30, 40], [20, 200, 60], [10, 40, 230]], dtype=torch.uint8)
    for name in ("a.mp4", "a.webm", "a.mkv", "a.avi"):
        write_video(tmp_path / name, colours[:, :, None, None].expand(-1, -1, 32, 48), rate=5)
        frames = read_clip(tmp_path / name, Uniform(3)).frames
        assert frames.dtype == torch.uint8 and frames.shape == (3, 3, 32, 48)
        assert (frames.float().mean(dim=(2, 3)) - colours).abs().max() < 6
    grey = torch.full((2, 1, 16, 16), 90, dtype=torch.uint8)
    write_video(tmp_path / "grey.mp4", grey, rate=5)
    assert (read_clip(tmp_path / "grey.mp4", Uniform(2)).frames.float() - 90).abs().max() < 4


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("a.mp4", {}, "rate is None"),
        ("a.gif", {"rate": 5}, "suffix"),
        ("a.mp4", {"rate": 5, "codec": "nosuch"}, "nosuch"),
        ("a.mp4", {"times": [0.0]}, "1 entries"),
        ("a.mp4", {"times": [0.0, 0.0]}, "increase"),
        ("a.avi", {"times": [0.0, 1.0]}, "avi"),
        ("a.webm", {"rate": 5, "audio": (torch.zeros(1, 800), 22050)}, "rate"),
    ],
)
def test_writing_wrong_arguments_leaves_no_file(tmp_path, name, settings, words):
    with pytest.raises(ConfigError, match=words):
        write_video(tmp_path / name, barcodes([1, 2]), **settings)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedShape, match="frames is"):
        write_video(tmp_path / "a.mp4", torch.zeros(0, 3, 8, 8, dtype=torch.uint8), rate=5)


def test_files_appear_whole(tmp_path, monkeypatch):
    """What stood there stays when writing fails in its middle."""
    import av

    write_video(tmp_path / "a.mp4", barcodes([1, 2]), rate=5)
    write_audio(tmp_path / "a.wav", torch.zeros(1, 800), 8000)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", full)
    monkeypatch.setattr(av.AudioFrame, "from_ndarray", full)
    with pytest.raises(OSError, match="No space"):
        write_video(tmp_path / "a.mp4", barcodes([3, 4]), rate=5)
    with pytest.raises(OSError, match="No space"):
        write_audio(tmp_path / "a.wav", torch.ones(1, 800), 8000)
    assert numbers_in(read_clip(tmp_path / "a.mp4", Uniform(2)).frames) == [1, 2]
    assert not read_audio(tmp_path / "a.wav")[0].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.wav"]


def test_keyframes_and_lossless(tmp_path):
    frames = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", frames, rate=5, quality=0, keyframes=4)
    with VideoReader(tmp_path / "a.mp4") as video:
        found = torch.stack([frame for _, frame in video.stream()])
        stream = video._input.stream(0)
        assert sum(entry.is_keyframe for entry in stream.index_entries) >= 3
    # Grey through limited-range YUV and back rounds twice.
    assert (found.float() - frames).abs().max() <= 2


@pytest.mark.parametrize("times", [[-5.0, 0.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_times_that_no_file_can_have(tmp_path, times):
    with pytest.raises(ConfigError, match="finite, and none may lie before"):
        write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), times=times)


def test_waves_that_are_no_sound(tmp_path):
    with pytest.raises(ConfigError, match="NaN"):
        write_audio(tmp_path / "a.wav", torch.full((1, 100), float("nan")), 8000)
    with pytest.raises(ConfigError, match="rate is 0"):
        write_audio(tmp_path / "a.wav", torch.zeros(1, 100), 0)
    write_audio(tmp_path / "a.wav", torch.zeros(1, 800), 8000)
    for wrong in ({"rate": 10**9}, {"start": 1e300}):
        with pytest.raises(ConfigError):
            read_audio(tmp_path / "a.wav", **wrong)


def test_times_far_behind_the_end_are_the_last_frame(tmp_path):
    write_video(tmp_path / "a.mp4", barcodes([0, 1, 2, 3, 4]), rate=10.0)
    with VideoReader(tmp_path / "a.mp4") as video:
        assert numbers_in(video.at([1e300, 1e15]).frames) == [4, 4]
        assert list(video.stream(1e300)) == []
