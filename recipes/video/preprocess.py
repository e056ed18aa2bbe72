"""Preprocessing of video files, saved with every model so that inference repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from ...backbones.config import called, positive
from ...errors import ConfigError, UnknownName
from ...modalities.common.classifier import Classifier
from ...modalities.common.values import check_pixels
from ...modalities.image.squares import resized_square
from ...modalities.video.files import VideoReader
from ...modalities.video.sampling import Dense, Sampling, Segments, Uniform, views
from ..common.preprocess import LONGEST, Preprocess, check_square, check_statistics

SAMPLINGS = ("uniform", "segments", "dense")
# The most pixels in all frames of a clip, and the most frames a second.
PIXELS, FASTEST = 1 << 28, 10_000


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The clips that a model sees of a video file.

    Args:
        size: side of the square that frames are cropped to, in pixels.
        channels: 3, or 1 for grey.
        frames: of a clip.
        sampling: "uniform", evenly over the whole file; "segments", one frame out of each of equal parts of the file,
            at a random place in training; "dense", `frames` at `rate` from a random place in training, and from the
            middle otherwise.
        rate: frames a second of "dense".
        crop: the fraction of the shorter side that is kept of held-out clips.
    """

    called: ClassVar[str] = "clip"

    size: int = 112
    channels: Literal[1, 3] = 3
    frames: int = 8
    sampling: Literal["uniform", "segments", "dense"] = "uniform"
    rate: float = 8.0
    crop: float = 0.9

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Any) -> None:
    check_square(config)
    positive(config, "frames", most=LONGEST)
    positive(config, "rate", most=FASTEST)
    if config.frames * config.size**2 > PIXELS:
        raise ConfigError(
            f"{called(config)}.frames is {config.frames} and size {config.size}; a clip has at most {PIXELS:,} pixels"
        )
    if config.sampling not in SAMPLINGS:
        raise UnknownName("clip.sampling", config.sampling, SAMPLINGS)


@dataclass(frozen=True, kw_only=True)
class VideoPreprocess(Preprocess):
    """Preprocessing of a video file; see `ClipConfig` for the other fields.

    Args:
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        seconds: duration of a clip.
    """

    size: int
    channels: int
    frames: int
    sampling: str
    rate: float
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seconds: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)
        check_statistics(self)
        positive(self, "seconds")

    def of_the_model(self, model: Classifier) -> dict[str, tuple[Any, Any]]:
        config = model.config.video
        shape = (self.frames, self.size, self.size)
        return {"channels": (self.channels, config.channels), "frames and size": (shape, config.size)}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.frames, self.size, self.size

    @property
    def sampler(self) -> Sampling:
        if self.sampling == "dense":
            return Dense(self.frames, self.rate)
        return {"uniform": Uniform, "segments": Segments}[self.sampling](self.frames)

    def load(self, media: Path | str | bytes) -> Float[Tensor, "c t h w"]:
        """The central view of a file: its frames resized by the shorter side, cut out of the centre, normalised.

        Raises:
            MediaError: the file cannot be read.
        """
        return self.load_views(media, 1, 1)[0]

    def load_views(self, media: Path | str | bytes, times: int, crops: int) -> Float[Tensor, "v c t h w"]:
        """All views of a file: at several times, and of each several squares along the longer side."""
        with VideoReader(media) as video:
            moments = views(video.info.duration, self.sampler, times)
            clips = [video.at(moment).frames for moment in moments]
        return torch.stack([self.finish(square) for clip in clips for square in self.squares(clip, crops)])

    def read(self, media: Path | str | bytes, seed: int | None) -> UInt8[Tensor, "t c h w"]:
        """The frames at their size in the file; a seed makes the place random."""
        with VideoReader(media) as video:
            return video.at(self.sampler.times(video.info.duration, seed)).frames

    def central(self, media: Path | str | bytes) -> UInt8[Tensor, "t k h w"]:
        """The central frames of the file, in the model's channels, as planes."""
        # Decoded frames come in another order of memory.
        return self.coloured(self.read(media, None)).contiguous()

    def squares(self, frames: Shaped[Tensor, "t c h w"], crops: int = 1) -> list[Float[Tensor, "t k s s"]]:
        """Squares of the frames in 0..1, resized by the shorter side: from edge to edge of the longer side; one is the
        centre."""
        frames = self.tinted(frames)
        places = [index / (crops - 1) if crops > 1 else 0.5 for index in range(crops)]
        return [resized_square(frames, self.size, round(self.size / self.crop), place) for place in places]

    def tinted(self, frames: Shaped[Tensor, "t c h w"]) -> Float[Tensor, "t k h w"]:
        """The frames in 0..1 in the model's channels.

        Raises:
            MediaError: floating-point frames that are NaN, infinite or far outside of 0..1.
        """
        if frames.is_floating_point():
            check_pixels(frames, "the video tensor")
            return self.coloured(frames).float()
        return self.coloured(frames).float() / 255

    def coloured(self, frames: Shaped[Tensor, "t c h w"]) -> Shaped[Tensor, "t k h w"]:
        """The frames in the model's channels."""
        from torchvision.transforms.v2 import functional as tv

        return frames if frames.shape[1] == self.channels else tv.rgb_to_grayscale(frames)

    def finish(self, frames: Float[Tensor, "t c h w"]) -> Float[Tensor, "c t h w"]:
        """Frames in 0..1 as the model takes them."""
        mean, std = (frames.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return ((frames - mean) / std).transpose(0, 1)

    def restore(self, clip: Float[Tensor, "c t h w"]) -> Float[Tensor, "t c h w"]:
        """The inverse of `finish`, in 0..1, to look at."""
        mean, std = (clip.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (clip.transpose(0, 1) * std + mean).clamp(0, 1)


def strip(frames: Float[Tensor, "t c h w"], count: int) -> Float[Tensor, "c h wide"]:
    """Some frames side by side, evenly from the first to the last."""
    shown = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(min(count, len(frames)))]
    gap = frames.new_ones(*frames.shape[1:3], 1)
    parts: list[Any] = [part for i in shown for part in (frames[i], gap)]
    return torch.cat(parts[:-1], dim=2)
