"""Videos as they are met: turned and mirrored, of pixels that are not square, in containers without time stamps."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import pytest
import torch

from omnimix.errors import MediaError
from omnimix.modalities import VideoReader, write_video
from omnimix.modalities.data.sources import VIDEO_SUFFIXES
from omnimix.modalities.video import files

from .decoder_stress import barcodes, numbers_in
from .media_mutations import peak_of

NTSC = Fraction(30000, 1001)


def encode(path: Path, frames: torch.Tensor, codec: str, rate: Fraction, form=None, sample=None, turn=None, **options):
    """A file as FFmpeg's encoders make it, with two B-frames between others."""
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=rate, options={"bf": "2", "x265-params": "log-level=none", **options})
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 12, 2_000_000
        stream.codec_context.thread_count = 1
        if sample is not None:
            stream.codec_context.sample_aspect_ratio = sample
        if turn is not None:
            stream.set_display_rotation(*turn)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = index, 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec", "form"),
    [
        ("ts", "libx264", "mpegts"),
        ("ts", "mpeg2video", "mpegts"),
        ("ts", "libx265", "mpegts"),
        ("mpg", "mpeg2video", "mpeg"),
        ("mpg", "mpeg1video", "mpeg"),
        ("vob", "mpeg2video", "vob"),
        ("m1v", "mpeg1video", "mpeg1video"),
        ("m2v", "mpeg2video", "mpeg2video"),
        ("m4v", "mpeg4", "m4v"),
        ("h264", "libx264", "h264"),
        ("hevc", "libx265", "hevc"),
        ("avi", "libx264", "avi"),
        ("avi", "mpeg4", "avi"),
        ("asf", "libx264", "asf"),
        ("flv", "libx264", "flv"),
    ],
)
@pytest.mark.parametrize("rate", [Fraction(25), NTSC], ids=["25", "ntsc"])
def test_ends_and_times_of_all_containers(tmp_path, suffix, codec, form, rate):
    count = 60
    path = tmp_path / f"film.{suffix}"
    assert path.suffix in VIDEO_SUFFIXES
    # Noise, for frames larger than a packet of a programme stream, which has at most one time stamp.
    pictures = barcodes(list(range(count)), side=96)
    pictures = (pictures * 0.8 + torch.randint(0, 50, pictures.shape)).to(torch.uint8)
    encode(path, pictures, codec, rate, form)
    off = 1.1e-3 if suffix in ("flv", "asf") else 1e-4  # these count milliseconds
    with VideoReader(path) as video:
        assert video.info.duration == pytest.approx(float(count / rate), abs=2e-3)
        seen = list(video.stream())
        assert numbers_in(torch.stack([frame for _, frame in seen])) == list(range(count))
        assert [time for time, _ in seen] == pytest.approx([float(i / rate) for i in range(count)], abs=off)
        assert suffix == "asf" or video.info.rate == pytest.approx(float(rate), rel=1e-4)
        for number in (50, 20, 59, 35, 0, 10):
            assert numbers_in(video.at([(number + 0.5) / float(rate)]).frames) == [number]


def quarters() -> torch.Tensor:
    """Red, green / blue, black, higher than wide."""
    frame = torch.zeros(3, 64, 32, dtype=torch.uint8)
    frame[0, :32, :16] = frame[1, :32, 16:] = frame[2, 32:, :16] = 255
    return frame


def corners(frame: torch.Tensor) -> str:
    height, width = frame.shape[1:]
    points = [frame[:, y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join("K" if point.max() < 90 else "RGB"[int(point.float().argmax())] for point in points)


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="an older PyAV")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("sample", [None, Fraction(3, 2), Fraction(1, 2)])
def test_display_matrices_and_pixels_that_are_not_square(tmp_path, suffix, degrees, mirrored, sample):
    path, still = tmp_path / f"film.{suffix}", quarters()
    turn = (float(degrees), mirrored)
    encode(path, still.expand(3, -1, -1, -1), "libx264", Fraction(5), sample=sample, turn=turn, qp="0")
    shown = still.rot90(degrees // 90, dims=(1, 2))
    shown = shown.flip(2) if mirrored else shown
    size = {None: (64, 32), Fraction(3, 2): (64, 48), Fraction(1, 2): (128, 32)}[sample]
    with VideoReader(path) as video:
        assert video.info.size == (size if degrees % 180 == 0 else size[::-1])
        for frame in (video.at([0.3]).frames[0], next(video.stream())[1]):
            assert frame.shape[1:] == video.info.size
            assert corners(frame) == corners(shown)


def test_shapes_that_no_film_has_are_refused(tmp_path, monkeypatch):
    encode(tmp_path / "flat.mp4", quarters().expand(3, -1, -1, -1), "libx264", Fraction(5), sample=Fraction(17))
    with pytest.raises(MediaError, match="64 x 32, with pixels of 17 : 1"):
        VideoReader(tmp_path / "flat.mp4")
    encode(tmp_path / "wide.mp4", quarters().expand(3, -1, -1, -1), "libx264", Fraction(5), sample=Fraction(2))
    monkeypatch.setattr(files, "_LARGEST", 64 * 64 - 1)
    with pytest.raises(MediaError, match="64 x 32, with pixels of 2 : 1"):
        VideoReader(tmp_path / "wide.mp4")


def test_a_gap_in_the_time_stamps_costs_nothing(tmp_path):
    write_video(tmp_path / "gap.mkv", barcodes([1, 2, 3]), times=[0.0, 0.1, 1_000_000.0])
    with VideoReader(tmp_path / "gap.mkv") as video:
        list(islice(video.stream(rate=8), 3))
        seen = []
        assert peak_of(lambda: seen.extend(islice(video.stream(rate=8), 50))) < 8 * 2**20
        assert [time for time, _ in seen] == [step / 8 for step in range(50)]
        assert numbers_in(torch.stack([frame for _, frame in seen])) == [1] + 49 * [2]
        # What is given is the receiver's own.
        seen[-1][1].zero_()
        assert numbers_in(seen[-2][1][None]) == [2]
        late = list(video.stream(999_999.9, rate=8))
        assert numbers_in(torch.stack([frame for _, frame in late])) == [2] + (len(late) - 1) * [3]
