"""Reading sound: samples where their time stamps say, windows, rates, channels, files that are broken."""

import io
import os

import pytest
import torch
from torchaudio.functional import resample

from omnimix.errors import ConfigError, MediaError, UnsupportedShape
from omnimix.modalities import read_audio, write_audio, write_video

EXACT = 2**-16 + 1e-7  # half a step of 16 bits


def noise(rate: int, seconds: float = 3.0, channels: int = 1):
    """Smooth noise: nothing in it resembles itself elsewhere, and lossy codecs keep it."""
    generator = torch.Generator().manual_seed(rate)
    raw = torch.randn(channels, 1, int(rate * seconds) + 60, generator=generator)
    wave = torch.nn.functional.conv1d(raw, torch.hann_window(61)[None, None])[:, 0]
    return wave / wave.abs().max() * 0.9


def lag(found, expected):
    """By how many samples `found` is late, and how much of it is not `expected` then (0 to 1)."""
    length = min(found.shape[1], expected.shape[1])
    a, b = found[0, :length], expected[0, :length]
    products = torch.fft.irfft(torch.fft.rfft(a, 2 * length) * torch.fft.rfft(b, 2 * length).conj(), 2 * length)
    best = int(products.argmax())
    return best - 2 * length if best >= length else best, float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 16000), ("a.flac", 44100), ("a.wav", 8000)])
def test_lossless_files(tmp_path, name, rate):
    wave = noise(rate, channels=2)
    write_audio(tmp_path / name, wave, rate)
    for source in (tmp_path / name, str(tmp_path / name), (tmp_path / name).read_bytes()):
        found, found_rate = read_audio(source, mono=False)
        assert found_rate == rate and found.dtype == torch.float32 and found.shape == wave.shape
        assert (found - wave).abs().max() <= EXACT
    with (tmp_path / name).open("rb") as file:
        found, _ = read_audio(file)
        assert (found - wave.mean(dim=0, keepdim=True)).abs().max() <= EXACT
        assert not file.closed


@pytest.mark.parametrize(
    ("name", "rate"), [("a.m4a", 44100), ("a.mp3", 16000), ("a.mp3", 44100), ("a.opus", 48000), ("a.ogg", 48000)]
)
def test_lossy_files_are_aligned(tmp_path, name, rate):
    wave = noise(rate)
    write_audio(tmp_path / name, wave, rate)
    found, found_rate = read_audio(tmp_path / name)
    assert found_rate == rate and found.shape == wave.shape
    late, wrong = lag(found, wave)
    assert late == 0 and wrong < 0.15


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 16000), ("a.flac", 44100), ("a.mp3", 44100), ("a.opus", 48000)])
def test_windows_are_parts_of_the_whole(tmp_path, name, rate):
    write_audio(tmp_path / name, noise(rate), rate)
    for new_rate in (rate, 12000):
        whole, _ = read_audio(tmp_path / name, rate=new_rate)
        assert whole.shape == (1, 3 * new_rate)
        for start, duration in ((0.0, 0.5), (0.31, 0.7), (2.123, 0.5), (1.5, None), (2.5, 9)):
            found, _ = read_audio(tmp_path / name, rate=new_rate, start=start, duration=duration)
            first = round(start * new_rate)
            expected = whole[:, first : None if duration is None else first + round(duration * new_rate)]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rates_are_torchaudios(tmp_path):
    wave = noise(16000)
    write_audio(tmp_path / "a.wav", wave, 16000)
    stored = (wave * 32768).round() / 32768
    found, rate = read_audio(tmp_path / "a.wav", rate=44100)
    assert rate == 44100
    torch.testing.assert_close(found, resample(stored, 16000, 44100))


@pytest.mark.parametrize("rate", [11127, 44101, 767_999])
def test_odd_rates_do_not_take_the_memory(tmp_path, rate):
    """A filter of the exact ratio 767999 : 16000 would have 10 ** 10 taps."""
    wave = torch.sin(torch.arange(rate // 2) * (2 * torch.pi * 200 / rate))[None]
    write_audio(tmp_path / "a.wav", wave, rate)
    found, _ = read_audio(tmp_path / "a.wav", rate=16000)
    assert abs(found.shape[1] - 8000) <= 1
    expected = torch.sin(torch.arange(8000) * (2 * torch.pi * 200 / 16000))[None]
    assert (found[:, 50:7950] - expected[:, 50:7950]).abs().max() < 2e-3
    header = bytearray((tmp_path / "a.wav").read_bytes())
    header[24:28] = (2_000_000_011).to_bytes(4, "little")
    with pytest.raises(MediaError, match="2000000011"):
        read_audio(bytes(header), rate=16000)


def test_sound_of_videos_counts_from_the_first_frame(tmp_path):
    frames = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    for name, rate, start in (
        ("a.mp4", 16000, 0.0),
        ("b.mp4", 16000, 2.5),
        ("a.mkv", 16000, 1.5),
        ("a.webm", 48000, 0),
    ):
        wave = noise(rate, 2.0)
        write_video(tmp_path / name, frames, rate=25, start=start, audio=(wave, rate))
        found, _ = read_audio(tmp_path / name)
        assert abs(found.shape[1] - wave.shape[1]) < 1024
        late, wrong = lag(found, wave)
        assert abs(late) <= rate // 1000 and wrong < 0.3
        part, _ = read_audio(tmp_path / name, start=1.25, duration=0.5)
        assert abs(lag(part, wave[:, int(1.25 * rate) : int(1.75 * rate)])[0]) <= rate // 1000


def test_sound_that_begins_late_and_pauses(tmp_path):
    """Gaps of time stamps are silent."""
    from fractions import Fraction

    import av

    wave = noise(8000, 1.0)
    with av.open(str(tmp_path / "gap.mkv"), "w") as file:
        picture = file.add_stream("mpeg4", rate=25)
        picture.width = picture.height = 32
        sound = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        for index in range(50):
            frame = av.VideoFrame(32, 32, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            file.mux(picture.encode(frame))
        for at, part in ((4000, wave[:, :4000]), (10000, wave[:, 4000:])):
            packed = (part * 32767).to(torch.int16).numpy()
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, at, Fraction(1, 8000)
            file.mux(sound.encode(frame))
        file.mux(picture.encode(None))
        file.mux(sound.encode(None))
    silent = torch.zeros(1, 4000)
    expected = torch.cat([silent, wave[:, :4000], silent[:, :2000], wave[:, 4000:]], dim=1)
    found, _ = read_audio(tmp_path / "gap.mkv")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    found, _ = read_audio(tmp_path / "gap.mkv", start=0.25, duration=1.25)
    torch.testing.assert_close(found, expected[:, 2000:12000], atol=1e-4, rtol=0)


def test_loud_waves_are_clipped(tmp_path):
    write_audio(tmp_path / "a.wav", torch.tensor([[2.0, -2.0, 0.5, 0.0] * 100]), 8000)
    found, _ = read_audio(tmp_path / "a.wav")
    torch.testing.assert_close(found[:, :4], torch.tensor([[32767 / 32768, -1.0, 0.5, 0.0]]))


@pytest.fixture
def broken(tmp_path):
    paths = {}
    for name, rate in (("a.wav", 16000), ("a.flac", 16000), ("a.m4a", 16000)):
        write_audio(tmp_path / name, noise(rate), rate)
        data = (tmp_path / name).read_bytes()
        paths[f"cut_{name}"] = data[: len(data) // 2]
        paths[f"head_{name}"] = data[:30]
    write_video(tmp_path / "film.mp4", torch.zeros(9, 3, 32, 32, dtype=torch.uint8), rate=9)
    contents = paths | {
        "empty.wav": b"",
        "letter.mp3": b"this is a letter, not a song\n" * 40,
        "silent.mp4": (tmp_path / "film.mp4").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in [*contents, "nowhere.wav"]}


def test_broken_files_are_named_and_closed(broken):
    before = len(os.listdir("/proc/self/fd"))
    for name, path in broken.items():
        with pytest.raises(MediaError, match=name):
            read_audio(path)
        assert len(os.listdir("/proc/self/fd")) == before, name
        if path.exists():
            with pytest.raises(MediaError, match="member 7"):
                read_audio(io.BytesIO(path.read_bytes()), name="member 7")
    with pytest.raises(MediaError, match="no sound"):
        read_audio(broken["silent.mp4"])
    with pytest.raises(MediaError, match="was cut"):
        read_audio(broken["cut_a.wav"])


def test_wrong_arguments(tmp_path):
    write_audio(tmp_path / "a.wav", noise(8000, 1.0), 8000)
    for settings, words in (
        ({"rate": 0}, "rate is 0"),
        ({"start": -1.0}, "start is -1.0"),
        ({"duration": 0.0}, "duration is 0.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_audio(tmp_path / "a.wav", **settings)
    with pytest.raises(MediaError, match="over before start=1.5"):
        read_audio(tmp_path / "a.wav", start=1.5)
    for name, wave, rate, error, words in (
        ("b.aiff", torch.zeros(1, 9), 8000, ConfigError, "suffix"),
        ("b.opus", torch.zeros(1, 9), 44100, ConfigError, "44100"),
        ("b.wav", torch.zeros(1, 0), 8000, UnsupportedShape, "wave is"),
        ("b.wav", torch.zeros(3, 9), 8000, UnsupportedShape, "wave is"),
    ):
        with pytest.raises(error, match=words):
            write_audio(tmp_path / name, wave, rate)
        assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
