"""Sampling of frame times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ...backbones.config import positive
from ...errors import ConfigError


@runtime_checkable
class Sampling(Protocol):
    """A way to choose times. All of them are a function of the duration and the seed alone."""

    def times(self, duration: float | int, seed: int | None = None) -> list[float]:
        """Increasing times in seconds from the first frame; without a seed the central ones, for testing."""
        ...

    def view(self, duration: float | int, part: float | int) -> list[float]:
        """The times of one of several views; `part` in 0..1 runs through the video."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Frames evenly spaced over the whole video; a seed moves all of them together, by less than the spacing.

    Args:
        frames: how many.
    """

    frames: int = 8

    def __post_init__(self) -> None:
        positive(self, "frames")

    def times(self, duration: float | int, seed: int | None = None) -> list[float]:
        return self.view(duration, 0.5 if seed is None else random.Random(seed).random())

    def view(self, duration: float | int, part: float | int) -> list[float]:
        _check(duration)
        return [duration * (index + min(part, 0.999)) / self.frames for index in range(self.frames)]


@dataclass(frozen=True)
class Segments:
    """One frame out of each of equal parts of the video, at a random place of its own.

    Temporal segment networks, Wang et al., ECCV 2016, arXiv 1608.00859, section 3.1.

    Args:
        frames: how many.
    """

    frames: int = 8

    def __post_init__(self) -> None:
        positive(self, "frames")

    def times(self, duration: float | int, seed: int | None = None) -> list[float]:
        _check(duration)
        draw = random.Random(seed)
        places = [0.5 if seed is None else draw.random() for _ in range(self.frames)]
        return [duration * (index + place) / self.frames for index, place in enumerate(places)]

    def view(self, duration: float | int, part: float | int) -> list[float]:
        return Uniform(self.frames).view(duration, part)


@dataclass(frozen=True)
class Dense:
    """Frames at a rate out of one window, of frames / rate seconds, at a random place; without a seed the middle.

    A video shorter than the window repeats its last frame.

    Args:
        frames: how many.
        rate: frames a second.
    """

    frames: int = 16
    rate: float | int = 8.0

    def __post_init__(self) -> None:
        positive(self, "frames")
        if not self.rate > 0:
            raise ConfigError(f"rate is {self.rate}; it must be above 0")

    def times(self, duration: float | int, seed: int | None = None) -> list[float]:
        return self.view(duration, 0.5 if seed is None else random.Random(seed).random())

    def view(self, duration: float | int, part: float | int) -> list[float]:
        _check(duration)
        start = max(0.0, duration - self.frames / self.rate) * part
        # Half a step in, so that a frame is not missed by a rounded time stamp.
        return [start + (index + 0.5) / self.rate for index in range(self.frames)]


def views(duration: float | int, sampling: Sampling, count: int) -> list[list[float]]:
    """Times of several views of a video, evenly spread over it, for testing on more than one.

    Args:
        duration: seconds.
        sampling: what one view is.
        count: how many. One is the central view.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1")
    windows = isinstance(sampling, Dense)
    # The first and the last window touch the ends; evenly spaced frames interleave.
    parts: Sequence[float] = [
        (index / (count - 1) if windows else (index + 0.5) / count) if count > 1 else 0.5 for index in range(count)
    ]
    return [sampling.view(duration, part) for part in parts]


def _check(duration: float | int) -> None:
    if not 0 <= duration < float("inf"):
        raise ConfigError(f"duration is {duration}; it must be seconds, at least 0")
