"""Labels over time for films of any length, predicted during decoding in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...modalities.video.files import VideoReader
from ...modalities.video.model import VideoClassifier, VideoState
from ..common.prediction import CPU
from ..common.timeline import Moment
from .preprocess import VideoPreprocess

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FilmMoment(Moment):
    """A segment of a film and the model's prediction.

    Args:
        frame: from the middle of what the model saw, in 0..1.
    """

    frame: Float[Tensor, "c h w"]


class Timeline:
    """Predicts the label of each moment of a film.

    A causal model streams: it has an output at each time step, and the prediction for a moment is the mean over as many
    of the last steps as a training clip has. Any other model runs on a sliding window of the length of a clip. Either
    way a moment lies in the middle of the frames that its prediction depends on.

    Args:
        model: in evaluation mode.
        preprocess: of its clips.
        every: moments per clip length.
        device: where the model is.
    """

    def __init__(self, model: VideoClassifier, preprocess: VideoPreprocess, every: int = 4, device: torch.device = CPU):
        if every < 1:
            raise ConfigError(f"every is {every}; it must be at least 1")
        self.model, self.preprocess = model, preprocess
        self.device = device
        self.rate = preprocess.frames / preprocess.seconds
        self.causal = model.tokenizer.config.causal
        unit = model.tokenizer.config.step if self.causal else 1
        # Frames from moment to moment, whole time steps of the model.
        self.hop = max(1, preprocess.frames // (every * unit)) * unit

    def moments(self, video: VideoReader) -> Iterator[FilmMoment]:
        """The moments of a film, from its beginning to its end, each as soon as it is known.

        Raises:
            MediaError: the file is corrupt; the moments before have been given.
        """
        said = self._streamed if self.causal else self._windowed
        length, at = video.info.duration, 0.0
        for moment in _with_last(said(self._frames(video))):
            (end, probabilities, frame), last = moment
            # A window ends at `end`; what it says counts for the `hop` frames around its middle.
            middle = end - 0.5 * self.preprocess.seconds
            stop = length if last else min(length, max(at, middle + 0.5 * self.hop / self.rate))
            yield FilmMoment(start=at, stop=stop, probabilities=probabilities, frame=frame)
            at = stop

    def _frames(self, video: VideoReader) -> Iterator[Tensor]:
        """Prepared frames (c, h, w), as many a second as the model's clips have; at least those of one clip."""
        count, last = 0, None
        for _, frame in video.stream(0.5 / self.rate, rate=self.rate):
            last = self.preprocess.squares(frame[None])[0][0]
            count += 1
            yield last
        if last is None:
            _, frame = next(video.stream())
            last = self.preprocess.squares(frame[None])[0][0]
        for _ in range(count, self.preprocess.frames):
            yield last

    def _windowed(self, frames: Iterator[Tensor]) -> Iterator[tuple[float, Tensor, Tensor]]:
        size = self.preprocess.frames
        window: deque[Tensor] = deque(maxlen=size)
        since = 0
        for count, frame in enumerate(frames, 1):
            window.append(frame)
            since += 1
            if count == size or (count > size and since >= self.hop):
                since = 0
                # Not around the loop: a context that a generator enters holds for its caller too, until the next item.
                with torch.inference_mode():
                    logits = self.model(self.preprocess.finish(torch.stack(tuple(window)))[None].to(self.device))
                yield count / self.rate, logits[0].float().cpu().softmax(-1), window[size // 2]

    def _streamed(self, frames: Iterator[Tensor]) -> Iterator[tuple[float, Tensor, Tensor]]:
        size, step = self.preprocess.frames, self.model.tokenizer.config.step
        steps = max(1, size // step)
        # The mean of their logits is the logits of their mean, since the head is linear.
        now: deque[Tensor] = deque(maxlen=steps)
        shown: deque[Tensor] = deque(maxlen=size)
        chunk: list[Tensor] = []
        state: VideoState | None = None
        count = 0
        for frame in frames:
            chunk.append(frame)
            shown.append(frame)
            if len(chunk) < self.hop:
                continue
            count += len(chunk)
            with torch.inference_mode():
                said = self.model.stream(self.preprocess.finish(torch.stack(chunk))[None].to(self.device), state)
            chunk, state = [], said.state
            now.extend(said.now[0])
            if len(now) == steps:
                yield (
                    count / self.rate,
                    torch.stack(tuple(now)).mean(0).float().cpu().softmax(-1),
                    shown[len(shown) // 2],
                )


def _with_last(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    held: list[T] = []
    for item in items:
        if held:
            yield held.pop(), False
        held.append(item)
    if held:
        yield held.pop(), True
