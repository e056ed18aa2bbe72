"""A trained model in Python: what `omnimix.load` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import LanguageModel
from ..errors import CheckpointError, ConfigError, UnsupportedShape
from ..modalities import load_model
from ..modalities.audio.files import LOUDEST
from ..modalities.audio.model import AudioClassifier
from ..modalities.common.classifier import Classifier
from ..modalities.common.values import check_samples
from ..modalities.common.weights import CONFIG, WEIGHTS
from ..modalities.data.sources import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, walk_files
from ..modalities.image.model import ImageClassifier
from ..modalities.text.text_generator import TextGenerator
from ..modalities.text.tokenizer import load_tokenizer
from ..modalities.video.model import VideoClassifier
from ..utils.devices import usable_device
from ..utils.run_folder import RunFolder
from .audio.preprocess import AudioPreprocess
from .common.preprocess import Preprocess
from .video.preprocess import VideoPreprocess
from .vision.preprocess import ImagePreprocess


@dataclass(frozen=True)
class _Kind:
    """What there is to know of one class of classifiers.

    Args:
        preprocess: how its inputs are prepared.
        noun: what its inputs are, in the plural.
        suffixes: of their files.
        prepare: an input that is a tensor, prepared.
    """

    preprocess: type[Preprocess]
    noun: str
    suffixes: frozenset[str]
    prepare: Callable[[Any, Tensor], Tensor]


def _clip(preprocess: VideoPreprocess, frames: Tensor) -> Float[Tensor, "c t h w"]:
    if frames.ndim != 4 or frames.shape[1] not in (1, 3) or not frames.numel():
        raise UnsupportedShape(f"inputs: shape {tuple(frames.shape)} is not (t, c, h, w), the frames of a video")
    if frames.is_floating_point():
        frames = (frames * 255).round().clamp(0, 255).to(torch.uint8)
    if frames.dtype != torch.uint8:
        raise UnsupportedShape(f"inputs: dtype {frames.dtype}; frames are uint8, or floating point in [0, 1]")
    if frames.shape[1] < preprocess.channels:
        frames = frames.expand(-1, preprocess.channels, -1, -1)
    index = torch.linspace(0, len(frames) - 1, preprocess.frames).round().long()
    return preprocess.finish(preprocess.squares(frames[index])[0])


def _wave(preprocess: AudioPreprocess, wave: Tensor) -> Float[Tensor, " n"]:
    if wave.ndim not in (1, 2) or not wave.numel() or not wave.is_floating_point():
        raise UnsupportedShape(
            f"inputs: {wave.dtype} of shape {tuple(wave.shape)}; audio is floating point, (n,) or (channels, n)"
        )
    check_samples(wave, "inputs", LOUDEST)
    return preprocess.fit(wave.float().reshape(-1, wave.shape[-1]).mean(0))


_KINDS: dict[type[Classifier], _Kind] = {
    ImageClassifier: _Kind(ImagePreprocess, "images", IMAGE_SUFFIXES, lambda p, image: p.load(image)),
    VideoClassifier: _Kind(VideoPreprocess, "videos", VIDEO_SUFFIXES, _clip),
    AudioClassifier: _Kind(AudioPreprocess, "audio files", AUDIO_SUFFIXES | VIDEO_SUFFIXES, _wave),
}


class Prediction(NamedTuple):
    """One class that a model names.

    Args:
        label: the name of the class.
        index: its place in `Predictor.classes`.
        probability: in [0, 1].
    """

    label: str
    index: int
    probability: float


class Predictor:
    """A classifier with its preprocessing and the names of its classes, in evaluation mode.

    Args:
        model: a classifier of images, videos or audio.
        preprocess: how its inputs are prepared.

    Example:
        >>> predictor = omnimix.load("runs/demo")
        >>> predictor.predict("digit.png")[0].label
        '7'
    """

    def __init__(self, model: Any, preprocess: Preprocess):
        self.model = model.eval()
        self.preprocess = preprocess
        self._kind = next(kind for base, kind in _KINDS.items() if isinstance(model, base))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by index."""
        return self.preprocess.classes

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Predictor:
        """Move the model to a device; returns itself.

        Raises:
            ConfigError: there is no such device.
        """
        self.model.to(usable_device(str(device)))
        return self

    def predict(self, inputs: Any, *, top: int = 1, batch_size: int = 32) -> list[Any]:
        """Classify one input or many.

        Args:
            inputs: a path, the bytes of a file, a PIL image, a NumPy array or a tensor; or a directory, a list or an
                iterator of them. Images are (h, w) or (h, w, c) as arrays and (h, w) or (c, h, w) as tensors; videos
                (t, h, w, c) and (t, c, h, w); both are uint8, or floating point in [0, 1]. Audio is (n,) or
                (channels, n), floating point, at the model's sampling rate.
            top: how many classes to return for each input, the most likely first.
            batch_size: how many inputs run through the model together.

        Returns:
            A list of `Prediction`s; for a directory, a list or an iterator, a list of such lists, in order.

        Raises:
            ConfigError: `top` or `batch_size` is below 1, or a directory holds no such files.
            MediaError: a file cannot be read.
            UnsupportedShape: an array or a tensor of another shape or dtype.
        """
        for name, number in (("top", top), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"{name} is {number}; it must be at least 1")
        many = self._many(inputs)
        results = [
            self._ranked(logits, top)
            for batch in _batches([inputs] if many is None else many, batch_size)
            for logits in self._logits(batch)
        ]
        return results[0] if many is None else results

    def _many(self, inputs: Any) -> Iterable[Any] | None:
        """The inputs where there are several; None for one."""
        if isinstance(inputs, str | Path) and Path(inputs).is_dir():
            files = walk_files(Path(inputs), self._kind.suffixes)
            if not files:
                raise ConfigError(f"inputs is {str(inputs)!r}, a directory without {self._kind.noun}")
            return files
        return inputs if isinstance(inputs, list | tuple | Iterator) else None

    @torch.inference_mode()
    def _logits(self, inputs: Sequence[Any]) -> Float[Tensor, "b classes"]:
        prepared = [self._prepared(_as_tensor(one)).to(self.device) for one in inputs]
        # Clips of several lengths are packed by the model.
        same = len({one.shape for one in prepared}) == 1
        return self.model(torch.stack(prepared) if same else prepared).float().cpu()

    def _prepared(self, one: Any) -> Tensor:
        return self._kind.prepare(self.preprocess, one) if isinstance(one, Tensor) else self.preprocess.load(one)

    def _ranked(self, logits: Float[Tensor, " classes"], top: int) -> list[Prediction]:
        values, indices = logits.softmax(-1).topk(min(top, len(self.classes)))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        return [Prediction(self.classes[index], index, value) for index, value in pairs]


def load(source: str | Path, *, device: str = "cpu") -> Predictor | TextGenerator:
    """A trained model that is ready to be used: with its preprocessing, or its tokenizer.

    Args:
        source: a run by its name under `runs/` or its directory, or a directory that `save_model` wrote with the
            preprocessing among its details. It may be a stranger's: nothing in it is imported or executed.
        device: where the model runs.

    Returns:
        A `Predictor` of classifiers, a `TextGenerator` of language models.

    Raises:
        CheckpointError: no such run or directory, it is corrupt, or it does not say how inputs were prepared.
        ConfigError: there is no such device.
    """
    place = usable_device(device)
    folder = Path(source)
    if not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        folder = RunFolder.finished(str(source)).path
    model = load_model(folder)
    if isinstance(model, LanguageModel):
        return TextGenerator(model.to(place), load_tokenizer(folder))
    for base, kind in _KINDS.items():
        if isinstance(model, base):
            return Predictor(model, kind.preprocess.of_model(folder, model)).to(place)
    raise CheckpointError(
        f"the model in {str(folder)!r} is a {type(model).__name__}, which has no predictor; use "
        "omnimix.modalities.load_model"
    )


def _as_tensor(given: Any) -> Any:
    """A NumPy array as a tensor, with its channels before rows and columns; anything else unchanged."""
    if type(given).__module__ != "numpy":
        return given
    array = torch.from_numpy(given.copy())
    return array.movedim(-1, -3) if array.ndim >= 3 and array.shape[-1] in (1, 3, 4) else array


def _batches(inputs: Iterable[Any], size: int) -> Iterator[list[Any]]:
    inputs = iter(inputs)
    while batch := list(islice(inputs, size)):
        yield batch
