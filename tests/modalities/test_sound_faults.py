"""Sounds whose values and time stamps no sound has."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from omnimix.errors import MediaError
from omnimix.modalities import read_audio
from omnimix.recipes.audio.data import LoadAudio
from omnimix.recipes.audio.preprocess import AudioPreprocess
from omnimix.recipes.common.media import Samples

from .media_mutations import peak_of


def float_wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    """A wav file of 32- or 64-bit floating-point samples (n, channels)."""
    size, channels = samples.itemsize, samples.shape[1]
    form = struct.pack("<HHIIHH", 3, channels, rate, rate * channels * size, channels * size, 8 * size)
    data = samples.astype(f"<f{size}").tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e29, -17.0, 32768.0])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("mono", [True, False])
def test_values_that_no_sound_has(value, kind, mono):
    samples = np.random.default_rng(0).uniform(-1, 1, (8000, 2)).astype(kind)
    whole, _ = read_audio(float_wav(samples), mono=False)
    torch.testing.assert_close(whole, torch.from_numpy(samples.T).float())
    # The mean of the channels would be fine.
    samples[5000] = value, -value
    with pytest.raises(MediaError, match=r"sound of 'member 7'.*-1\.\.1"):
        read_audio(float_wav(samples), mono=mono, name="member 7")
    with pytest.raises(MediaError, match="member 7"):
        read_audio(float_wav(samples), rate=16000, start=0.6, duration=0.1, name="member 7")


def test_sounds_that_overshoot_are_read():
    samples = np.linspace(-4, 4, 8000, dtype=np.float32)[:, None]
    wave, _ = read_audio(float_wav(samples))
    torch.testing.assert_close(wave, torch.from_numpy(samples.T))


class Folder:
    """Two files, of which the second has a sample that is not a number."""

    classes = ("a",)

    def __init__(self, root: Path):
        samples = np.zeros((8000, 1), np.float32)
        (root / "good.wav").write_bytes(float_wav(samples))
        samples[3] = np.nan
        (root / "bad.wav").write_bytes(float_wav(samples))
        self.files = [root / "good.wav", root / "bad.wav"]

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return str(self.files[index])

    def label(self, index: int) -> int:
        return 0

    def media(self, index: int) -> Path:
        return self.files[index]


def test_such_a_file_is_skipped_and_named(tmp_path):
    samples = Samples(Folder(tmp_path), LoadAudio(AudioPreprocess(classes=("a",), rate=8000, seconds=1.0)))
    assert samples[0, 0]["problem"] is None and samples[0, 0]["audio"].isfinite().all()
    name, reason = samples[0, 1]["problem"]
    assert name.endswith("bad.wav") and "bad.wav" in reason and "nan" in reason


def gaps(path: Path, *starts: float, rate: int = 8000) -> bytes:
    """A tenth of a second of sound at each of some times."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("pcm_s16le", rate=rate, layout="mono")
        for start in starts:
            frame = av.AudioFrame.from_ndarray(np.full((1, rate // 10), 1000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return path.read_bytes()


def test_gaps_do_not_take_the_memory(tmp_path):
    short = gaps(tmp_path / "short.mkv", 0, 200, 400)
    wave, rate = read_audio(short)
    assert wave.shape[1] == 400.1 * rate and wave.count_nonzero() == 0.3 * rate
    many = gaps(tmp_path / "many.mkv", 0, 500, 1000, 1500)
    fast = gaps(tmp_path / "fast.mkv", 0, 400, rate=768_000)
    for data in (many, fast):

        def refused(data=data):
            with pytest.raises(MediaError, match="time stamps jump by"):
                read_audio(data)

        assert peak_of(refused) < 64 * 2**20
