"""Read the sound of audio and video files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from ...errors import ConfigError
from ..common.container import Input, Source, slack
from ..common.values import check_samples

# Seconds decoded before a window: codecs need what came before (MP3 up to nine frames, Opus 80 ms).
_PREROLL = 0.5
# Time stamps are rounded, to milliseconds in webm and mkv; only what misses by more is a gap or an overlap.
_JITTER = 0.02
# A corrupt time stamp must not become hours of silence. A file may have so many seconds and samples of it, and as much
# again as it has sound.
_GAP, _SILENT = 600.0, 1 << 26
# At a lower one a small file, resampled, would be a long sound.
_RATES = 1000, 1_000_000
# Seconds beyond which no window of a file can lie.
_LONGEST = 1e9
# Samples beyond this, 24 dB above the full scale, are no sound. Lossy codecs and floating-point files overshoot less.
LOUDEST = 16.0


def read_audio(
    source: Source,
    *,
    rate: int | None = None,
    mono: bool = True,
    start: float | int = 0.0,
    duration: float | int | None = None,
    name: str | None = None,
) -> tuple[Float32[Tensor, "c n"], int]:
    """Read the first sound track of an audio or video file.

    Samples are placed by their time stamps: encoder padding before the beginning is dropped, and gaps are silent.
    Time zero is the first sample; in a file with a video it is the video's first frame. A window equals that part of
    the whole, to within a tick of the file's clock (a millisecond in webm and mkv) and what a lossy codec adds.

    Args:
        source: a path, the bytes of a file, or an open binary file.
        rate: samples a second to resample to; None leaves the file's.
        mono: average the channels into one.
        start: seconds.
        duration: seconds; None reads to the end. Fewer samples are given where the file ends before.
        name: what error messages call the source; by default the path.

    Returns:
        The wave, in -1..1 but for what floating-point files and lossy codecs overshoot, and its rate.

    Raises:
        MediaError: missing, empty, not a media file, without sound, corrupt, cut, over before `start`, or with samples
            that are NaN, infinite or beyond 16. MP3, Ogg and bare streams state no length: one that was
            cut reads as a shorter one.
        ConfigError: a rate, start or duration out of range.
    """
    if rate is not None and not (rate == int(rate) and 1 <= rate <= _RATES[1]):
        raise ConfigError(f"rate is {rate}; it must be a whole number from 1 to {_RATES[1]:,}, or None")
    rate = None if rate is None else int(rate)
    if not 0 <= start < _LONGEST:
        raise ConfigError(f"start is {start}; it must be seconds, at least 0")
    if duration is not None and not 0 < duration < _LONGEST:
        raise ConfigError(f"duration is {duration}; it must be seconds, above 0, or None")
    file = Input(source, name)
    try:
        track = _Track(file, mono)
        window = _Window(track.rate, rate or track.rate, start, duration)
        wave = track.read(window.first, window.last)
    finally:
        file.close()
    return window.resampled(wave, file), window.new_rate


class _Window:
    """The samples of the file that the result needs."""

    def __init__(self, rate: int, new_rate: int, start: float | int, duration: float | int | None):
        self.start, self.new_rate = start, new_rate
        # The resampling filter has as many taps as the product of the two. This is exact for the rates in use; an odd
        # one, as of a damaged header, is off by less than a millionth.
        self.ratio = Fraction(rate, new_rate).limit_denominator(1000)
        step = self.ratio.numerator
        # Samples on both sides that the filter sees (torchaudio's: six zero crossings), and a first one that falls on
        # a sample of the result.
        margin = 0 if self.ratio == 1 else math.ceil(7 * max(1.0, rate / new_rate)) + 1
        self.first = max(0, (math.floor(start * rate) - margin) // step * step)
        self.skipped = round(start * new_rate) - int(self.first / self.ratio)
        self.count = None if duration is None else max(1, round(duration * new_rate))
        self.last = None if duration is None else math.ceil((start + duration) * rate) + margin + 1

    def resampled(self, wave: Tensor, file: Input) -> Tensor:
        if self.ratio != 1 and wave.shape[1]:
            from torchaudio.functional import resample

            wave = resample(wave, self.ratio.numerator, self.ratio.denominator)
        wave = wave[:, self.skipped :]
        wave = wave if self.count is None else wave[:, : self.count]
        if not wave.shape[1]:
            raise file.error(f"its sound is over before start={self.start}")
        return wave.contiguous()


class _Track:
    """The first sound track of a file; positions are samples from time zero."""

    def __init__(self, file: Input, mono: bool):
        found = file.streams("audio")
        if not found:
            raise file.error("it has no sound")
        self.file, self.index, self.mono = file, found[0], mono
        self._decoded = file.frames(self.index)
        self._head = next(self._decoded, None)
        if self._head is None:
            raise file.error("its sound has no samples")
        self.rate, self._channels = self._head.sample_rate, len(self._head.layout.channels)
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise file.error(f"its header says {self.rate} samples a second")
        video = [file.stream(index) for index in file.streams("video")]
        begin = self._time(self._head)
        if video and video[0].start_time is not None:
            begin = float(video[0].start_time * video[0].time_base)
        self._zero = begin or 0.0

    @staticmethod
    def _time(frame: Any) -> float | None:
        return None if frame.pts is None else float(frame.pts * frame.time_base)

    def read(self, first: int, last: int | None) -> Float32[Tensor, "c n"]:
        """Samples first .. last - 1; fewer where the track ends before."""
        pieces: list[Tensor] = []
        at, spare = first, min(_SILENT, round(_GAP * self.rate))
        for position, samples in self._pieces(first):
            length = samples.shape[1]
            spare += length
            if position > at:
                spare -= position - at
                if spare < 0:
                    raise self.file.error(f"its time stamps jump by {(position - at) / self.rate:.0f} s")
                silent = (position if last is None else min(position, last)) - at
                pieces.append(samples.new_zeros(samples.shape[0], max(0, silent)))
                at = position
            if position + length > at:
                pieces.append(samples[:, at - position :])
                at = position + length
            if last is not None and at >= last:
                break
        else:
            at = self._check_end(at)
        wave = torch.cat(pieces, dim=1) if pieces else torch.zeros(1 if self.mono else self._channels, 0)
        return wave[:, : (at if last is None else min(at, last)) - first]

    def _pieces(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Positions and samples of the frames in order, from at least as early as `first`."""
        expected: int | None = None
        for frame in self._frames(first):
            if frame.is_corrupt:
                raise self.file.error("its sound is corrupt")
            if frame.sample_rate != self.rate or len(frame.layout.channels) != self._channels:
                raise self.file.error("its rate or number of channels changes midway")
            time = self._time(frame)
            if time is not None:
                position = round((time - self._zero) * self.rate)
                if expected is not None and abs(position - expected) > _GAP * self.rate:
                    raise self.file.error(f"its time stamps jump by {(position - expected) / self.rate:.0f} s")
                if expected is None or abs(position - expected) > _JITTER * self.rate:
                    expected = position
            expected = expected or 0
            yield expected, self._samples(frame)
            expected += frame.samples

    def _frames(self, first: int) -> Iterator[Any]:
        target = first / self.rate - _PREROLL
        # MP3 has no list of where its frames are: times after a seek are guesses.
        if target > _PREROLL and not self.file.container.format.name.startswith("mp3"):
            self.file.seek(self.index, self._zero + target)
            self._decoded = self.file.frames(self.index)
            self._head = next(self._decoded, None)
            time = self._time(self._head) if self._head is not None else None
            if time is None or (time - self._zero) * self.rate > first:
                self.file.open()
                self._decoded = self.file.frames(self.index)
                self._head = next(self._decoded, None)
        if self._head is not None:
            yield self._head
        yield from self._decoded

    def _samples(self, frame: Any) -> Float32[Tensor, "c n"]:
        values = torch.from_numpy(frame.to_ndarray())
        if not frame.format.is_planar:
            values = values.view(-1, self._channels).T
        if values.dtype == torch.uint8:
            values = (values.to(torch.float32) - 128) / 128
        elif not values.is_floating_point():
            values = values.to(torch.float64) / -float(torch.iinfo(values.dtype).min)
        else:
            check_samples(values, f"the sound of {self.file.name!r}", LOUDEST)
        values = values.to(torch.float32)
        return values.mean(dim=0, keepdim=True) if self.mono else values

    def _check_end(self, at: int) -> int:
        """Where the track ends, of which samples up to `at` were decoded."""
        stream = self.file.stream(self.index)
        stated = None
        if stream.duration is not None:
            stated = (stream.start_time or 0) + stream.duration
            stated = round((float(stated * stream.time_base) - self._zero) * self.rate)
        end = float(self.file.tail(self.index).end) - self._zero
        if at / self.rate < end - slack(end):
            raise self.file.error(f"its sound can be decoded up to {at / self.rate:.2f} s only, of {end:.2f} s")
        # The last block of a lossy codec is padded; containers that know say where the sound ended.
        return stated if stated is not None and 0 < at - stated <= 4096 else at
