"""Preprocessing of audio files, saved with every model so that inference repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...backbones.config import called, positive
from ...errors import ConfigError
from ...modalities.audio.files import read_audio
from ...modalities.common.classifier import Classifier
from ...modalities.data.sources import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from ..common.preprocess import Preprocess

# The highest rate, and the most seconds and samples of a clip.
FASTEST, LONGEST = 1 << 20, 3600
SAMPLES = 1 << 28
# Many audio data sets are videos.
SUFFIXES = AUDIO_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class AudioPreprocess(Preprocess):
    """Preprocessing of a file with sound.

    Args:
        rate: samples a second; every file is resampled to it, and its channels are mixed into one.
        seconds: duration of the model's input: longer clips are cropped to the middle, shorter ones padded with silence
            on both sides; None takes whole clips of any length.
    """

    rate: int
    seconds: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "rate", most=FASTEST)
        positive(self, "seconds", most=LONGEST)
        if self.seconds is not None and self.rate * self.seconds > SAMPLES:
            what = f"{called(self)}.rate is {self.rate} and seconds {self.seconds}"
            raise ConfigError(f"{what}; a clip has at most {SAMPLES:,} samples")

    def of_the_model(self, model: Classifier) -> dict[str, tuple[Any, Any]]:
        return {"rate": (self.rate, model.tokenizer.config.rate)}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rate if self.seconds is None else round(self.seconds * self.rate),)

    def read(self, media: Path | str | bytes) -> Float[Tensor, " n"]:
        """The whole sound of a file.

        Raises:
            MediaError: the file cannot be read, or has no sound.
        """
        return read_audio(media, rate=self.rate)[0][0]

    def load(self, media: Path | str | bytes) -> Float[Tensor, " n"]:
        """The part of a file's sound that the model takes. Errors: see `read`."""
        return self.fit(self.read(media))

    def fit(self, wave: Float[Tensor, " n"], place: float = 0.5) -> Float[Tensor, " m"]:
        """The part of a clip, or the clip in the silence around it, `place` of the way from the first possible place
        to the last."""
        if self.seconds is None:
            return wave
        length = round(self.seconds * self.rate)
        spare = length - wave.shape[0]
        if spare <= 0:
            start = round(place * -spare)
            return wave[start : start + length]
        before = round(place * spare)
        return F.pad(wave, (before, spare - before))
