"""Moving handwritten digits as mp4 files: the class is the motion, which no single frame shows."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ...errors import ConfigError
from ...modalities.common.encode import write_video
from ...modalities.data.sources import VIDEO_SUFFIXES, Source, find_splits
from ...utils.log import logger_of, progress
from ...utils.options import cores
from ..common.loading import mix
from ..common.synthetic import MOST, generated_folder
from ..vision.data import stratified_split
from ..vision.folders import Augment
from .data import LOADING, VideoData, VideoOptions
from .preprocess import ClipConfig, VideoPreprocess

logger = logger_of(__name__)

# By the angle of the way, anticlockwise from the right as one draws it; pixels count downwards.
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
MOTIONS = (*DIRECTIONS, "zoom-in", "zoom-out", "rotate")
RATE, FRAMES, SIDE = 16.0, 16, 32
_HOLDOUT = 0.2
_CLIP = ClipConfig(size=SIDE, channels=1, frames=FRAMES, crop=1.0)


@dataclass(frozen=True, kw_only=True)
class Way:
    """Where the digit is over the seconds of a clip, as fractions of the frame's side and in radians.

    Every class samples centre, size and angle from the same distributions: at the middle of a clip they say nothing
    about the class.
    """

    centre: tuple[float, float]
    velocity: tuple[float, float]
    size: float
    growth: float
    angle: float
    spin: float

    def at(self, times: Float[Tensor, " t"]) -> tuple[Float[Tensor, "t 2"], Float[Tensor, " t"], Float[Tensor, " t"]]:
        """Centre (x, y), size and angle at seconds from the middle of the clip."""
        centre = torch.tensor(self.centre) + times[:, None] * torch.tensor(self.velocity)
        return centre, self.size * torch.exp(self.growth * times), self.angle + self.spin * times


def draw_way(motion: str, seconds: float, generator: torch.Generator) -> Way:
    """A way of the class `motion`."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    speed, growth, spin = between(0.3, 0.75), between(0.45, 0.75), between(1.6, 4.2)
    side = 1.0 if between(0.0, 1.0) < 0.5 else -1.0
    # In the middle of a zoom the size is such that its ends stay within the bounds; all classes share that range.
    reach = 0.5 * growth * seconds
    size = math.exp(between(math.log(0.32) + reach, math.log(0.75) - reach))
    heading = math.pi / 4 * DIRECTIONS.index(motion) if motion in DIRECTIONS else 0.0
    moves = speed if motion in DIRECTIONS else 0.0
    return Way(
        centre=(between(0.0, 1.0), between(0.0, 1.0)),
        velocity=(moves * math.cos(heading), -moves * math.sin(heading)),
        size=size,
        growth={"zoom-in": growth, "zoom-out": -growth}.get(motion, 0.0),
        angle=between(0.0, 2 * math.pi),
        # Clockwise where it is positive, since pixels count downwards.
        spin=spin * side if motion == "rotate" else 0.0,
    )


def render(
    digit: Float[Tensor, "h w"], way: Way, times: Float[Tensor, " t"], side: int, generator: torch.Generator
) -> UInt8[Tensor, "t 3 side side"]:
    """The frames at seconds from the middle of the clip.

    The frame's left and right edges are one, and so are top and bottom: a digit that leaves reenters, and is equally
    likely everywhere, whatever its direction. Digit and background have colours, the background is uneven, and
    there is noise.
    """
    centre, size, angle = way.at(times)
    place = (torch.arange(side) + 0.5) / side
    x = torch.remainder(place[None, None, :] - centre[:, 0, None, None] + 0.5, 1) - 0.5
    y = torch.remainder(place[None, :, None] - centre[:, 1, None, None] + 0.5, 1) - 0.5
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1) * (2 / size[:, None, None, None])
    pixels = digit.expand(len(times), 1, *digit.shape)
    shape = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    back, front = _colours(generator)
    uneven = F.interpolate(
        torch.rand(1, 3, 4, 4, generator=generator) - 0.5, size=(side, side), mode="bicubic", align_corners=False
    )
    ground = back[:, None, None] + 0.25 * uneven
    frames = ground + shape * (front[:, None, None] - ground)
    frames = frames + 0.04 * torch.randn(frames.shape, generator=generator)
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


def _colours(generator: torch.Generator) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Colours of background and digit, light on dark."""
    dark, light = 0.05 + 0.3 * torch.rand(3, generator=generator), 0.65 + 0.35 * torch.rand(3, generator=generator)
    return dark, light


def moving_digits_folder(train: int, val: int) -> Path:
    """The folder with that many clips, `SPLIT/CLASS/NUMBER.mp4`, generated if it is not in the user's cache.

    The digits of held-out clips are never those of training clips. What a clip shows depends on its number alone.

    Args:
        train, val: clips of all classes together.
    """
    return generated_folder(f"moving-digits-{train}-{val}-v1", lambda folder: write_clips(folder, train, val))


def write_clips(folder: Path, train: int, val: int) -> None:
    """Write `train` and `val` clips below a folder, on all cores."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    halves = stratified_split(torch.from_numpy(digits.target), _HOLDOUT)
    for split in ("train", "val"):
        for motion in MOTIONS:
            (folder / split / motion).mkdir(parents=True)
    jobs = [("train", halves[0], n) for n in range(train)] + [("val", halves[1], n) for n in range(val)]

    def job(work: tuple[str, Int[Tensor, " n"], int]) -> None:
        split, members, number = work
        motion = MOTIONS[number % len(MOTIONS)]
        generator = torch.Generator().manual_seed(mix(("train", "val").index(split), number))
        digit = images[members[int(torch.randint(len(members), (), generator=generator))]]
        write_clip(folder / split / motion / f"{number:05d}.mp4", digit, motion, generator)

    text = f"writing {len(jobs):,} clips as mp4 files, once"
    with ThreadPoolExecutor(cores()) as pool, progress(logger, text, len(jobs)) as advance:
        for _ in pool.map(job, jobs):
            advance(1)


def write_clip(path: Path, digit: Float[Tensor, "h w"], motion: str, generator: torch.Generator) -> None:
    """Write one clip of a second. One in eight has a variable frame rate, and one in eight a clock that starts late."""
    steps = torch.arange(FRAMES) + 0.0
    kind = int(torch.randint(8, (), generator=generator))
    if kind == 0:
        steps[1:] += 0.6 * (torch.rand(FRAMES - 1, generator=generator) - 0.5)
    times = steps / RATE
    way = draw_way(motion, FRAMES / RATE, generator)
    frames = render(digit, way, times + 0.5 / RATE - 0.5 * FRAMES / RATE, SIDE, generator)
    start = 1.5 if kind == 1 else 0.0
    if kind == 0:
        write_video(path, frames, times=times.tolist(), start=start)
    else:
        write_video(path, frames, rate=RATE, start=start)


class MovingDigitsData(VideoData):
    """Clips of a second of handwritten digits that move; the class is the motion: eight directions, zoom, rotation.

    The files are generated once (see `moving_digits_folder`), and read like any others.

    Args:
        train: clips to train on.
        val: clips that are held out, of digits that no training clip shows.
        clip: the clips that the model sees of a file.
        augment: augmentation of training clips; None augments nothing.
        loading: the options of all video data sets except the policy for unreadable files; frames are kept in memory.
    """

    defaults = replace(VideoData.defaults, keep=True, policy="raise", max_unreadable=0.0)
    fixed = dict.fromkeys(("policy", "max_unreadable"), "its files are generated")

    def __init__(
        self,
        *,
        train: int = 3600,
        val: int = 600,
        clip: ClipConfig = _CLIP,
        augment: Augment | None = None,
        loading: VideoOptions = LOADING,
    ):
        super().__init__(loading=loading)
        self.augment = augment
        for name, count in (("train", train), ("val", val)):
            if not len(MOTIONS) <= count <= MOST:
                least = f"at least {len(MOTIONS)}, a clip of each class"
                raise ConfigError(f"data.{name} is {count}; it must be {least}, and at most {MOST:,}")
        self._counts = train, val
        self.preprocess = VideoPreprocess(
            classes=tuple(sorted(MOTIONS)),
            **asdict(clip),
            mean=(0.3,) * clip.channels,
            std=(0.2,) * clip.channels,
            seconds=clip.frames / clip.rate if clip.sampling == "dense" else FRAMES / RATE,
        )

    def prepare_data(self) -> None:
        moving_digits_folder(*self._counts)

    def find(self) -> dict[str, Source]:
        return find_splits(moving_digits_folder(*self._counts), VIDEO_SUFFIXES)
