"""Reading videos: the frame that is on the screen, files of all kinds, files that are broken, files that stay open."""

import gc
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch.utils.data import DataLoader

from omnimix.errors import ConfigError, MediaError, UnsupportedCall, UnsupportedShape
from omnimix.modalities import Segments, Uniform, VideoReader, read_clip, write_video
from omnimix.modalities.video import files as decode

from .decoder_stress import barcodes, films, moment, numbers_in, resident


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Good and bad files by name."""
    return {film.path.name: film for film in films(tmp_path_factory.mktemp("films"))}


GOOD = ("constant.mp4", "constant.webm", "variable.mp4", "variable.mkv", "late.mp4", "late.mkv", "one.mp4", "one.webm")


@pytest.fixture
def open_files():
    """How many files this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", GOOD)
def test_frames_by_time(made, name):
    film = made[name]
    draw = random.Random(name)
    with VideoReader(film.path) as video:
        assert video.info.duration == pytest.approx(film.length, abs=0.09)
        for _ in range(6):
            wanted = [moment(draw, -0.5, film.length + 0.5) for _ in range(5)]
            clip = video.at(wanted)
            expected = [film.frame(time) for time in wanted]
            assert numbers_in(clip.frames) == expected
            assert clip.times.tolist() == pytest.approx([film.times[number] for number in expected], abs=1e-3)
        # At exactly the time of a frame it is that frame, rounded though its stamp is.
        numbers = list(range(0, len(film.times), 7))
        assert numbers_in(video.at([film.times[number] for number in numbers]).frames) == numbers


@pytest.mark.parametrize("name", GOOD)
def test_streams(made, name):
    film = made[name]
    with VideoReader(film.path.read_bytes()) as video:
        seen = list(video.stream())
        assert numbers_in(torch.stack([frame for _, frame in seen])) == list(range(len(film.times)))
        assert [time for time, _ in seen] == pytest.approx(film.times, abs=1e-3)
        start, stop = film.length / 3 // 0.01 / 100 + 0.005, film.length / 2
        times = [time for time, _ in video.stream(start, stop)]
        assert times == pytest.approx([time for time in film.times if start <= time < stop], abs=1e-3)
        steps = list(video.stream(start=0.005, rate=10.0))
        wanted = [0.005 + index / 10 for index in range(len(steps))]
        assert [time for time, _ in steps] == pytest.approx(wanted)
        assert wanted[-1] < video.info.duration <= wanted[-1] + 0.1 + 1e-9
        assert numbers_in(torch.stack([frame for _, frame in steps])) == [film.frame(time) for time in wanted]


def test_rates_that_are_no_whole_ticks(tmp_path):
    for name, rate in (("ntsc.mp4", 30000 / 1001), ("thirty.webm", 30.0), ("film.avi", 24.0), ("slow.mov", 0.5)):
        write_video(tmp_path / name, barcodes(list(range(20))), rate=rate)
        with VideoReader(tmp_path / name) as video:
            assert video.info.rate == pytest.approx(rate, rel=1e-3)
            assert video.info.duration == pytest.approx(20 / rate, rel=1e-2)
            assert numbers_in(video.at([index / rate for index in range(20)]).frames) == list(range(20))


def test_long_gaps_are_sought_and_short_ones_decoded(made, monkeypatch):
    film = made["constant.mp4"]  # a keyframe every 12 frames or sooner
    with VideoReader(film.path) as video:
        video.at([0.0])
        seeks, pictures = [], []
        seek, timed = video._input.seek, decode._timed
        monkeypatch.setattr(video._input, "seek", lambda *place: (seeks.append(place), seek(*place)))
        monkeypatch.setattr(decode, "_timed", lambda *file: (pictures.append(frame) or frame for frame in timed(*file)))
        assert numbers_in(video.at([0.12, 0.2]).frames) == [3, 5]
        assert not seeks
        assert numbers_in(video.at([3.0, 3.04]).frames) == [75, 76]
        assert len(seeks) == 1
        assert len(pictures) < 20
        assert numbers_in(video.at([0.0]).frames) == [0]
        assert len(seeks) == 2


def test_any_source(made):
    film = made["variable.mkv"]
    data = film.path.read_bytes()
    expected = read_clip(film.path, Uniform(4))
    with film.path.open("rb") as file:
        file.seek(100)
        for source in (str(film.path), data, io.BytesIO(data), file):
            clip = read_clip(source, Uniform(4))
            assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.times, expected.times)
        assert not file.closed


def test_sources_that_are_none(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UnsupportedShape, match="a int"):
        VideoReader(7)


def test_names_are_no_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", barcodes([1, 2]), rate=5)
    for name in ("12:30.mp4", "http:x.mp4", "naïve — 100%d.mp4"):
        (tmp_path / "a.mp4").rename(name)
        assert numbers_in(read_clip(name, Uniform(2)).frames) == [1, 2]
        Path(name).rename("a.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(MediaError, match=name):
            read_clip(name, Uniform(2))


def test_rotation_and_odd_sizes(tmp_path):
    upright = barcodes([5, 9, 700])
    write_video(tmp_path / "turned.mp4", upright.rot90(-1, dims=(2, 3)), rate=5, rotation=90)
    with VideoReader(tmp_path / "turned.mp4") as video:
        assert numbers_in(video.at([0.1, 0.3, 0.5]).frames) == [5, 9, 700]
        assert numbers_in(torch.stack([frame for _, frame in video.stream()])) == [5, 9, 700]
    wide = torch.arange(0, 250, 10, dtype=torch.uint8).expand(2, 3, 13, 25)
    write_video(tmp_path / "odd.mp4", wide, rate=5, quality=0)
    write_video(tmp_path / "side.mp4", wide, rate=5, rotation=-90)
    assert (read_clip(tmp_path / "odd.mp4", Uniform(2)).frames.float() - wide).abs().max() < 4
    with VideoReader(tmp_path / "side.mp4") as video:
        assert video.info.size == (25, 13)
        assert video.at([0.0]).frames.shape == (1, 3, 25, 13)


def broken(folder: Path, made) -> dict[str, Path]:
    whole = made["constant.mp4"].path.read_bytes()
    at = whole.index(b"mdat") + 4
    (folder / "folder.mp4").mkdir()
    contents = {
        "empty.mp4": b"",
        "letter.mp4": b"this is a letter, not a film\n" * 20,
        "noise.webm": random.Random(0).randbytes(5000),
        "head.mp4": whole[:100],
        "no_index.mp4": whole[: len(whole) * 4 // 5],
        "corrupt.mp4": whole[:at] + random.Random(0).randbytes(3000) + whole[at + 3000 :],
        "middle.mp4": whole[: at + 3000] + bytes(6000) + whole[at + 9000 :],
        "sound.wav": b"RIFF" + (44).to_bytes(4, "little") + b"WAVEfmt " + bytes(36),
    }
    for name, part in (("constant.webm", 0.3), ("variable.mkv", 0.8), ("late.mkv", 0.5)):
        data = made[name].path.read_bytes()
        contents[f"cut_{name}"] = data[: int(len(data) * part)]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in [*contents, "folder.mp4", "nowhere.mp4"]}


def test_broken_files_are_named_and_closed(tmp_path, made, open_files):
    paths = broken(tmp_path, made)
    before = open_files()
    for name, path in paths.items():
        with pytest.raises(MediaError, match=name) as caught:
            read_clip(path, Uniform(8))
        assert caught.value.__traceback__ is not None
        assert open_files() == before, name
        if path.is_file():
            with pytest.raises(MediaError, match="member 7"):
                read_clip(path.read_bytes(), Uniform(8), name="member 7 of a shard")
    with pytest.raises(MediaError, match="was cut"):
        read_clip(paths["cut_constant.webm"], Uniform(8))
    with pytest.raises(MediaError, match="empty"):
        read_clip(b"", Uniform(8))


def test_files_that_are_no_video(tmp_path):
    from omnimix.modalities import write_audio

    write_audio(tmp_path / "a.flac", torch.zeros(1, 4000), 8000)
    with pytest.raises(MediaError, match="no video"):
        VideoReader(tmp_path / "a.flac")
    # The pictures of film and songs' covers are video streams to FFmpeg; text is not to be drawn.
    (tmp_path / "art.txt").write_text("\x1b[31mred\x1b[0m\n" * 200)
    with pytest.raises(MediaError, match="art.txt"):
        VideoReader(tmp_path / "art.txt")


def test_a_film_whose_header_lost_the_pictures(tmp_path):
    import av

    write_video(tmp_path / "whole.mp4", barcodes(list(range(50))), rate=25, keyframes=10)
    with av.open(str(tmp_path / "whole.mp4")) as source:
        first = str(tmp_path / "index_first.mp4")
        with av.open(first, "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    data = Path(first).read_bytes()
    assert numbers_in(read_clip(data, Uniform(5)).frames) == [5, 15, 25, 35, 45]
    for part in (0.5, 0.75, 0.9):
        with pytest.raises(MediaError):
            read_clip(data[: int(len(data) * part)], Uniform(5))


def test_damaged_bytes_give_frames_or_a_media_error(made):
    draw = random.Random(0)
    outcomes = []
    for name in ("constant.mp4", "constant.webm", "variable.mkv"):
        whole = made[name].path.read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            for _ in range(draw.choice((2, 20))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            try:
                outcomes.append(read_clip(bytes(damaged), Segments(4), seed=0).frames.shape == (4, 3, 64, 64))
            except MediaError:
                outcomes.append(False)
    assert 0 < sum(outcomes) < len(outcomes)


def test_frames_that_ffmpeg_patched_up_are_refused(made):
    """A decoder that misses data fills in from elsewhere and says so in a flag only."""
    import av

    draw = random.Random(0)
    whole = made["late.mp4"].path.read_bytes()
    begin, end, patched = whole.index(b"mdat") + 4, whole.rindex(b"moov") - 4, 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[draw.randrange(begin, end)] = draw.randrange(256)
        with av.open(io.BytesIO(damaged)) as file:
            file.streams.video[0].codec_context.thread_count = 1
            try:
                flags = [frame.is_corrupt for frame in file.decode(video=0)]
            except av.FFmpegError:
                continue
        if any(flags):
            patched += 1
            with pytest.raises(MediaError, match="corrupt"), VideoReader(bytes(damaged)) as video:
                assert len(list(video.stream())) == len(flags)
    assert patched > 2


def test_files_are_closed(made, open_files):
    path = made["constant.mp4"].path
    before = open_files()
    gc.disable()  # by us, not by the collector of cycles
    try:
        for _ in range(5):
            read_clip(path, Uniform(3))
            with VideoReader(path) as video:
                for _ in video.stream():
                    break
            abandoned = VideoReader(path).stream()
            next(abandoned)
            assert open_files() == before + 1
            del abandoned
            with pytest.raises(ZeroDivisionError), VideoReader(path) as video:
                video.at([1 / 0])
            assert open_files() == before
    finally:
        gc.enable()
    video.close()
    with pytest.raises(UnsupportedCall, match="closed"):
        video.at([0.0])


def test_streaming_takes_the_memory_of_a_frame(tmp_path):
    write_video(tmp_path / "a.mp4", barcodes(list(range(120)), side=192), rate=25, quality=35)
    with VideoReader(tmp_path / "a.mp4") as video:
        held = []
        for _ in video.stream():
            held.append(resident())
        assert len(held) == 120
        assert max(held[40:]) - max(held[:40]) < 3 * 2**20, "of 13 MB of pixels"


def test_reads_that_interleave(made):
    with VideoReader(made["constant.mp4"].path) as video:
        stream = video.stream()
        next(stream)
        video.at([2.0])
        with pytest.raises(UnsupportedCall, match="another read"):
            next(stream)
        assert numbers_in(video.at([0.1]).frames) == [2]


def test_readers_stay_in_their_process(made):
    video = VideoReader(made["constant.mp4"].path)
    with pytest.raises(UnsupportedCall, match="path"):
        pickle.dumps(video)
    video.close()


class Broken:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return read_clip(b"no film", Uniform(2), name=f"sample {index}").frames


def test_errors_cross_to_the_process_that_trains():
    with pytest.raises(MediaError) as caught:
        Broken()[0]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    batches = iter(DataLoader(Broken(), batch_size=None, num_workers=1, timeout=60))
    with pytest.raises(MediaError, match="sample 0"):
        next(batches)
    # A loader that is at its end lets its workers go; otherwise it waits five seconds for them.
    assert next(batches, None) is None


def test_a_fork_neither_hangs_nor_reads_with_what_it_copied(made):
    path = made["constant.mp4"].path
    video = VideoReader(path, threads=2)
    video.at([1.0])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                video.at([2.0])
            except UnsupportedCall:
                code = 2
            # To free the decoder would wait for threads that only the parent has.
            del video
            gc.collect()
            if code == 2 and numbers_in(read_clip(path, Uniform(3)).frames) == [15, 45, 75]:
                code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(status) == 0
    assert numbers_in(video.at([3.0]).frames) == [75]
    video.close()


def test_reads_in_forked_and_spawned_workers():
    script = Path(__file__).with_name("decoder_stress.py")
    done = subprocess.run([sys.executable, script, "60"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 reads of 60" in done.stdout


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: VideoReader(path, threads=0), "threads is 0"),
        (lambda path: VideoReader(path).at([]), "times is"),
        (lambda path: VideoReader(path).at([float("nan")]), "times is"),
        (lambda path: VideoReader(path).stream(rate=0.0), "rate is 0.0"),
        (lambda path: VideoReader(path).stream(start=-1.0), "start is -1.0"),
    ],
)
def test_wrong_arguments(made, call, words):
    with pytest.raises(ConfigError, match=words):
        call(made["one.mp4"].path)
