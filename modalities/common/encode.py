"""Write video and audio files from tensors. A file appears whole or not at all."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...errors import ConfigError, MediaError, UnsupportedShape
from ...utils.files import replace_file

# Suffix -> (container, codec by default).
VIDEO_FORMATS = {
    ".mp4": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
    ".avi": ("avi", "mpeg4"),
}
AUDIO_FORMATS = {
    ".wav": ("wav", "pcm_s16le"),
    ".flac": ("flac", "flac"),
    ".m4a": ("ipod", "aac"),
    ".mp3": ("mp3", "libmp3lame"),
    ".ogg": ("ogg", "libopus"),
    ".opus": ("ogg", "libopus"),
}
# Codecs of a video's sound; all other containers take AAC.
_SOUND = {".webm": "libopus"}
# Frames of 24, 25, 30, 50, 60 and 30000/1001 a second last whole ticks, and MPEG-4 allows no finer clock.
_TICKS = 60_000
# Samples of sound that are encoded at once.
_CHUNK = 4096
# A time, a stream, and what is to be encoded then: a frame, or None for the rest that the encoder holds.
_Step = tuple[float, Any, Any]


def write_video(
    path: str | Path,
    frames: UInt8[Tensor, "t c h w"],
    *,
    rate: float | int | None = None,
    times: Sequence[float | int] | None = None,
    start: float | int = 0.0,
    codec: str | None = None,
    quality: int = 18,
    keyframes: int = 48,
    rotation: int = 0,
    audio: tuple[Float[Tensor, "channels n"], int] | None = None,
) -> None:
    """Write a video file of RGB (or grey) frames.

    Args:
        path: the suffix is the container: mp4, mov, mkv, webm or avi.
        frames: one channel or three.
        rate: frames a second; needed unless `times` is given.
        times: seconds at which each frame appears, increasing: a variable frame rate (not in avi).
        start: seconds added to every time of picture and sound: a file whose clock does not begin at zero.
        codec: an encoder of FFmpeg's; None takes H.264, or VP9 in webm, or MPEG-4 in avi.
        quality: the constant rate factor: 0 is lossless in H.264, 18 looks lossless, 28 is small.
        keyframes: the largest distance between key frames, in frames.
        rotation: degrees counterclockwise by which players rotate the picture.
        audio: a wave in -1..1 and its rate, which begins with the first frame.

    Raises:
        ConfigError: an unknown suffix or codec, times that do not increase, or not as many as frames.
        UnsupportedShape: no frames, or not 1 or 3 channels.
    """
    path = Path(path)
    clock = _clock(frames, rate, times, start)
    if path.suffix.lower() not in VIDEO_FORMATS:
        raise ConfigError(f"path is {str(path)!r}; its suffix must be one of {', '.join(VIDEO_FORMATS)}")
    container, default = VIDEO_FORMATS[path.suffix.lower()]
    if container == "avi" and (times is not None or start or audio):
        raise ConfigError(f"path is {str(path)!r}; avi takes silent frames at a constant rate from zero: use mp4")
    options = _options(codec or default, default, quality)
    sound = _SOUND.get(path.suffix.lower(), "aac")
    fps = _fraction(rate, clock)
    tick = 1 / fps if container == "avi" else Fraction(1, _TICKS)

    def write(part: Path) -> None:
        with _Output(part, container) as output:
            picture = output.stream(codec or default, fps, options=options)
            picture.height, picture.width = frames.shape[2:]
            # Chroma is halved only where there is an even number of pixels to halve.
            picture.pix_fmt = "yuv444p" if frames.shape[2] % 2 or frames.shape[3] % 2 else "yuv420p"
            picture.codec_context.gop_size = keyframes
            picture.codec_context.time_base = tick
            if rotation:
                picture.set_display_rotation(float(rotation))
            lanes = [_pictures(picture, frames, clock, tick)]
            if audio:
                lanes.append(_sounds(output.stream(sound, audio[1], layout=_layout(audio[0])), *audio, start))
            for _, stream, frame in heapq.merge(*lanes, key=lambda step: step[0]):
                output.add(stream, frame)

    replace_file(path, write)


def _options(codec: str, default: str, quality: int) -> dict[str, str]:
    """An encoder's options, in files whose usual one is `default`."""
    options = {"crf": str(quality), "b": "0"} if default != "mpeg4" else {"flags": "+qscale", "global_quality": "236"}
    options |= {"deadline": "good", "cpu-used": "5"} if codec.startswith("libvpx") else {}
    return options | ({"preset": "veryfast"} if codec in ("libx264", "libx265") else {})


def write_audio(path: str | Path, wave: Float[Tensor, "channels n"], rate: int, *, start: float | int = 0.0) -> None:
    """Write an audio file.

    Args:
        path: the suffix is the format: wav and flac are exact to 16 bits; m4a, mp3, ogg and opus are lossy.
        wave: in -1..1 (louder is clipped), one channel or two.
        rate: samples a second; Opus takes 48000 only.
        start: seconds at which the file's clock begins, where the format has one.

    Raises:
        ConfigError: an unknown suffix, a rate that the codec does not know, or samples that are not finite.
        UnsupportedShape: an empty wave or more than two channels.
    """
    path = Path(path)
    if rate < 1:
        raise ConfigError(f"rate is {rate}; it must be samples a second, at least 1")
    if not bool(wave.isfinite().all()):
        raise ConfigError("wave has samples that are NaN or infinite")
    if path.suffix.lower() not in AUDIO_FORMATS:
        raise ConfigError(f"path is {str(path)!r}; its suffix must be one of {', '.join(AUDIO_FORMATS)}")
    container, codec = AUDIO_FORMATS[path.suffix.lower()]

    def write(part: Path) -> None:
        with _Output(part, container) as output:
            for _, stream, frame in _sounds(output.stream(codec, rate, layout=_layout(wave)), wave, rate, start):
                output.add(stream, frame)

    replace_file(path, write)


class _Output:
    """A container open for writing, with FFmpeg's errors as ours."""

    def __init__(self, path: Path, container: str):
        import av
        from av.codec.codec import UnknownCodecError
        from av.error import FFmpegError

        self._errors = (FFmpegError, ValueError, UnknownCodecError)
        # FFmpeg takes what precedes a colon in a name for a protocol.
        self._container = av.open(f"file:{path}", "w", format=container)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._container.close()
        except self._errors as closing:
            if error is None:
                raise MediaError(f"cannot write the file: {closing}") from closing

    def stream(self, codec: str, rate: int | Fraction, **settings: Any) -> Any:
        try:
            stream = self._container.add_stream(codec, rate=rate, **settings)
        except self._errors as error:
            raise ConfigError(f"codec is {codec!r}: {error}; `av.codecs_available` lists them") from error
        # Threads would make the bytes depend on the machine, and must not live when a process forks.
        stream.codec_context.thread_count = 1
        return stream

    def add(self, stream: Any, frame: Any) -> None:
        try:
            for packet in stream.encode(frame):
                self._container.mux(packet)
        except self._errors as error:
            name, rate = stream.codec_context.name, stream.codec_context.rate
            raise ConfigError(f"{name} at a rate of {rate} cannot take this: {error}") from error


def _clock(
    frames: Tensor, rate: float | int | None, times: Sequence[float | int] | None, start: float | int
) -> list[float | int]:
    if frames.shape[0] < 1 or 0 in frames.shape or frames.shape[1] not in (1, 3):
        raise UnsupportedShape(f"frames is {tuple(frames.shape)}; a video has at least one frame of 1 or 3 channels")
    if not 0 <= start < math.inf:
        raise ConfigError(f"start is {start}; it must be seconds, at least 0")
    if times is None:
        if rate is None or not 0 < rate < math.inf:
            raise ConfigError(f"rate is {rate}; it must be frames a second, above 0, unless `times` is given")
        return [start + index / rate for index in range(frames.shape[0])]
    if len(times) != frames.shape[0]:
        raise ConfigError(f"times has {len(times)} entries for {frames.shape[0]} frames; each frame needs one")
    if not all(math.isfinite(time) for time in times) or start + times[0] < 0:
        raise ConfigError(f"times begin with {times[0]}; all must be finite, and none may lie before the file's start")
    if any(later - earlier < 1e-3 for earlier, later in pairwise(times)):
        raise ConfigError("times must increase by at least a millisecond, the finest that every container keeps")
    return [start + time for time in times]


def _fraction(rate: float | int | None, clock: list[float | int]) -> Fraction:
    """Frames a second, on average where they vary, as encoders need it."""
    if rate is None:
        rate = (len(clock) - 1) / (clock[-1] - clock[0]) if len(clock) > 1 else 25
    return max(Fraction(1, 1000), Fraction(rate).limit_denominator(1001))


def _layout(wave: Tensor) -> str:
    if wave.shape[1] < 1 or wave.shape[0] not in (1, 2):
        raise UnsupportedShape(f"wave is {tuple(wave.shape)}; it must have 1 or 2 channels and at least one sample")
    return "mono" if wave.shape[0] == 1 else "stereo"


def _pictures(stream: Any, frames: Tensor, clock: list[float | int], tick: Fraction) -> Iterator[_Step]:
    import av
    from av.video.reformatter import VideoReformatter

    scaler, size = VideoReformatter(), {"height": frames.shape[2], "width": frames.shape[3]}
    for picture, time in zip(frames, clock, strict=True):
        pixels = picture.expand(3, -1, -1).permute(1, 2, 0).contiguous()
        frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
        frame = scaler.reformat(frame, format=stream.pix_fmt, threads=1, **size)
        frame.time_base, frame.pts = tick, round(time / tick)
        yield time, stream, frame
    yield math.inf, stream, None


def _sounds(stream: Any, wave: Tensor, rate: int, start: float | int) -> Iterator[_Step]:
    import av

    samples = (wave.detach().to(torch.float64) * 32768).round().clamp(-32768, 32767).to(torch.int16)
    for at in range(0, samples.shape[1], _CHUNK):
        packed = samples[:, at : at + _CHUNK].T.contiguous().view(1, -1)
        frame = av.AudioFrame.from_ndarray(packed.numpy(), format="s16", layout=_layout(wave))
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start * rate) + at
        yield start + at / rate, stream, frame
    yield math.inf, stream, None
