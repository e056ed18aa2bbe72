"""Read frames of a video by time.

A frame is chosen by its time stamp, not by its index: rates vary, clocks start anywhere, and headers are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from ...errors import ConfigError, MediaError, UnsupportedCall
from ..audio.files import read_audio
from ..common.container import Input, Source, slack
from .sampling import Sampling

__all__ = ["Clip", "VideoInfo", "VideoReader", "read_audio", "read_clip"]


# By how many seconds a time stamp may be off: webm and mkv count milliseconds.
_ROUNDED = 5e-4
# Pixels; twice those of 8K. A damaged header must not take all memory.
_LARGEST = 1 << 26
# How many times as wide as high, or as high as wide, a pixel may be.
_SQUEEZED = 16


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video.

    Args:
        duration: seconds from the first frame to the end of the last, by the file's last packets.
        frames: as the header says, None where it does not (webm, mkv). Nothing here relies on it.
        rate: frames a second on average, None where it is unknown.
        size: (height, width) as shown: with square pixels, rotated and mirrored as the file says.
        start: seconds on the file's clock when the first frame appears. All other times count from it.
    """

    duration: float
    frames: int | None
    rate: float | None
    size: tuple[int, int]
    start: float


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Args:
        frames: RGB, as shown.
        times: when each of them appears, in seconds from the first frame of the video.
    """

    frames: UInt8[Tensor, "t c h w"]
    times: Float64[Tensor, " t"]


class _Frame(NamedTuple):
    time: float  # seconds from the first frame of the video
    picture: Any


class VideoReader:
    """An open video. A reader can be neither pickled nor used after a fork.

    Opening decodes the first frame, whose time is zero from then on, and reads the last packets, which give the
    duration and show whether the file was cut.

    Args:
        source: a path, the bytes of a file, or an open binary file.
        threads: how many decode. Use one in a worker of a data loader.
        name: what error messages call the source; by default the path.

    Raises:
        MediaError: missing, empty, not a media file, without video, cut, or its first frame cannot be decoded.
    """

    info: VideoInfo

    def __init__(self, source: Source, *, threads: int = 1, name: str | None = None):
        from av.video.reformatter import VideoReformatter

        if threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1")
        self._scaler = VideoReformatter()
        self._decoded: Iterator[_Frame] = iter(())
        # The frame on the screen, and the one that follows it.
        self._shown: _Frame | None = None
        self._ahead: _Frame | None = None
        self._reads = 0
        # On the file's clock; exact, so that times do not gather rounding errors.
        self._start = Fraction(0)
        self._input = Input(source, name, threads)
        with ExitStack() as failing:
            failing.callback(self.close)
            self.info = self._examine()
            failing.pop_all()

    def _examine(self) -> VideoInfo:
        found = self._input.streams("video")
        if not found:
            raise self._input.error("it has no video")
        self._index = found[0]
        declared = self._input.stream(self._index).codec_context
        if declared.width * declared.height > _LARGEST:
            raise self._input.error(f"its header says that its frames are {declared.height} x {declared.width}")
        first = next(_clocked(self._input, self._index), None)
        if first is None:
            raise self._input.error("it has no frames")
        self._start, picture = first
        self._shape = _Shape(picture, self._input.stream(self._index).sample_aspect_ratio, self._input)
        tail = self._input.tail(self._index)
        self._last, end = tail.last, tail.end
        stream = self._input.stream(self._index)
        self._tolerance = min(max(0.5 * float(stream.time_base), 1e-6), _ROUNDED)
        rate = self._input.rate(self._index)
        if end <= self._last:
            # Nothing says how long the last frame lasts.
            end = self._last + self._input.frame_seconds(self._index)
        return VideoInfo(
            duration=max(0.0, float(end - self._start)),
            frames=stream.frames or None,
            rate=None if rate is None else float(rate),
            size=self._shape.size,
            start=float(self._start),
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # PyAV's containers and streams refer to each other: only the cycle collector would close the file.
        if hasattr(self, "_input"):
            self.close()

    def __getstate__(self) -> Any:
        raise UnsupportedCall("a VideoReader cannot be pickled; pass the path and open it in the process that reads")

    def close(self) -> None:
        """Close the file. Closing it again has no effect."""
        self._decoded, self._shown, self._ahead = iter(()), None, None
        self._input.close()

    def at(self, times: Sequence[float | int]) -> Clip:
        """The frames shown at some times.

        Args:
            times: seconds from the first frame, in any order, also repeated. Times before the first frame give
                the first, times after the last the last. They are compared to within half a millisecond, to which webm
                and mkv round.

        Raises:
            MediaError: the file is corrupt before the last of the times.
            ConfigError: no times, or one that is not finite.
        """
        if not len(times) or not all(math.isfinite(time) for time in times):
            raise ConfigError(f"times is {list(times)!r}; it must hold at least one time, and finite ones")
        self._reads += 1
        # Pixels stay together, as they were decoded: planes would be one more pass, and resizing is faster without.
        frames = torch.empty(len(times), *self.info.size, 3, dtype=torch.uint8)
        found = torch.empty(len(times), dtype=torch.float64)
        done: tuple[_Frame, int] | None = None
        for place in sorted(range(len(times)), key=times.__getitem__):
            shown = self._go(times[place])
            frames[place] = frames[done[1]] if done and done[0] is shown else self._rgb(shown)
            found[place] = shown.time
            done = shown, place
        return Clip(frames.permute(0, 3, 1, 2), found)

    def stream(
        self, start: float | int = 0.0, stop: float | int | None = None, rate: float | int | None = None
    ) -> Iterator[tuple[float, UInt8[Tensor, "c h w"]]]:
        """Iterate over frames, in memory that does not depend on the length of the video.

        Args:
            start: seconds from the first frame.
            stop: seconds; None is the end.
            rate: None gives each frame that appears in start <= time < stop, with its time. A number gives so many
                frames a second: the times start, start + 1 / rate, ... with the frame on the screen at each.

        Raises:
            MediaError: the file is corrupt; frames before that have been given.
            UnsupportedCall: another read of this reader began before this one was done.
            ConfigError: a start or rate out of range.
        """
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"rate is {rate}; it must be frames a second, above 0, or None")
        if not 0 <= start < math.inf:
            raise ConfigError(f"start is {start}; it must be seconds, at least 0")
        if stop is not None and math.isnan(stop):
            raise ConfigError("stop is NaN; it must be seconds, or None")
        stop = self.info.duration if stop is None else min(stop, self.info.duration)
        return self._stream(float(start), float(stop), rate)

    def _stream(self, start: float, stop: float, rate: float | int | None) -> Iterator[tuple[float, Tensor]]:
        self._reads += 1
        read, steps = self._reads, 0
        shown = self._go(start)
        while True:
            picture: Tensor | None = None
            if rate is None:
                due = iter([shown.time] if start - self._tolerance <= shown.time < stop else [])
            else:
                until = min(stop, self._ahead.time if self._ahead else math.inf) - self._tolerance
                # One by one: a gap in the time stamps may be as long as a header can say.
                due = takewhile(until.__gt__, (start + step / rate for step in count(steps)))
            for time in due:
                steps += 1
                picture = self._rgb(shown).permute(2, 0, 1) if picture is None else picture.clone()
                yield time, picture
                if read != self._reads:
                    raise UnsupportedCall("another read of this reader began; open a reader for each of the two")
            if self._ahead is None or self._ahead.time >= stop:
                return
            shown = self._step(self._ahead)

    def _go(self, time: float | int) -> _Frame:
        """Move to the frame on the screen at a time."""
        time = min(max(time, 0.0), self.info.duration)
        shown = self._shown
        if shown is None or time + self._tolerance < shown.time or self._keyframe_before(time):
            shown = self._seek(time)
        while self._ahead is not None and self._ahead.time <= time + self._tolerance:
            shown = self._step(self._ahead)
        return shown

    def _step(self, frame: _Frame) -> _Frame:
        """Show the frame that lay ahead."""
        self._input.check()
        self._shown, self._ahead = frame, next(self._decoded, None)
        end = float(self._last - self._start) - slack(self.info.duration)
        if self._ahead is None and frame.time < end:
            raise self._input.error(
                f"its frames can be decoded up to {frame.time:.2f} s only, of {self.info.duration:.2f} s"
            )
        return frame

    def _keyframe_before(self, time: float | int) -> bool:
        """Whether decoding can begin later than where the reader stands, and not after `time`."""
        if self._ahead is None or self._input.is_counted(self._index):
            return False
        stream = self._input.stream(self._index)
        place = stream.index_entries.search_timestamp(int((time + float(self._start)) / stream.time_base))
        if place < 0:
            return False
        return stream.index_entries[place].timestamp * stream.time_base - self._start > self._ahead.time

    def _seek(self, time: float | int) -> _Frame:
        # A seek may land late where the container lists decoding times or guesses from sizes.
        for back in () if self._input.is_counted(self._index) else (0.0, 1.0, 10.0, math.inf):
            target = max(time - back, 0.0)
            try:
                self._input.seek(self._index, float(self._start) + target)
            except MediaError:
                break
            self._load()
            if self._shown is not None and self._shown.time <= time + self._tolerance:
                return self._shown
            if target == 0:
                break
        self._input.open()
        self._load()
        if self._shown is None:
            raise self._input.error("its frames can no longer be decoded")
        return self._shown

    def _load(self) -> None:
        self._decoded = _timed(self._input, self._index, self._start)
        self._shown = next(self._decoded, None)
        self._ahead = next(self._decoded, None) if self._shown else None

    def _rgb(self, frame: _Frame) -> UInt8[Tensor, "h w c"]:
        if frame.picture.is_corrupt:
            raise self._input.error(f"the frame at {frame.time:.2f} s is corrupt")
        with self._input.reading():
            return self._shape.shown(frame.picture, self._scaler)


class _Shape:
    """How frames are shown: their size after their pixels are made square, and how they are rotated and mirrored.

    Some files change their size midway; all frames are scaled to the first one's.

    Args:
        picture: the first frame.
        sample: the ratio of a pixel's width to its height, None where it is unknown.
    """

    def __init__(self, picture: Any, sample: Fraction | None, file: Input):
        height, width = picture.height, picture.width
        # Only enlarged, so that no pixel is lost.
        ratio = sample or Fraction(1)
        self._height = max(height, round(height / ratio))
        self._width = max(width, round(width * ratio))
        if self._height * self._width > _LARGEST or not 1 / _SQUEEZED <= ratio <= _SQUEEZED:
            pixels = "" if ratio == 1 else f", with pixels of {ratio.numerator} : {ratio.denominator}"
            raise file.error(f"its frames are {height} x {width}{pixels}")
        self._swapped, self._flipped = _display(picture)

    @property
    def size(self) -> tuple[int, int]:
        return (self._width, self._height) if self._swapped else (self._height, self._width)

    def shown(self, picture: Any, scaler: Any) -> UInt8[Tensor, "h w c"]:
        picture = scaler.reformat(picture, width=self._width, height=self._height, format="rgb24", threads=1)
        pixels = torch.from_numpy(picture.to_ndarray())
        pixels = pixels.transpose(0, 1) if self._swapped else pixels
        return pixels.flip(self._flipped) if self._flipped else pixels


def _display(picture: Any) -> tuple[bool, list[int]]:
    """Whether rows become columns, and which sides are mirrored after that, by the frame's display matrix.

    The matrix maps a point (x, y) to (a x + c y, b x + d y). The nearest of the eight orientations is taken.
    """
    import numpy as np
    from av.sidedata.sidedata import Type

    found = picture.side_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return False, []
    a, b, _, c, d, *_ = np.frombuffer(bytes(found), dtype="=i4").tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    right, down = (c, b) if swapped else (a, d)
    return swapped, [side for side, way in ((0, down), (1, right)) if way < 0]


def _clocked(file: Input, index: int) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their times on the file's clock."""
    if file.is_counted(index):
        yield from file.counted_frames(index)
        return
    last, lasts = Fraction(0) - file.frame_seconds(index), file.frame_seconds(index)
    for picture in file.frames(index):
        last = last + lasts if picture.pts is None else picture.pts * picture.time_base
        yield last, picture


def _timed(file: Input, index: int, start: Fraction) -> Iterator[_Frame]:
    # No method: a generator that holds the reader that holds the generator would keep the file open.
    for time, picture in _clocked(file, index):
        yield _Frame(float(time - start), picture)


def read_clip(source: Source, sampling: Sampling, seed: int | None = None, *, name: str | None = None) -> Clip:
    """Read some frames of a video file.

    Args:
        source: a path, the bytes of a file, or an open binary file.
        sampling: which moments: `Uniform`, `Segments` or `Dense`.
        seed: of a random choice, a function of the seed alone; None takes the central one.
        name: what error messages call the source; by default the path.

    Raises:
        MediaError: missing, empty, without video, cut or corrupt.
    """
    with VideoReader(source, name=name) as video:
        return video.at(sampling.times(video.info.duration, seed))
