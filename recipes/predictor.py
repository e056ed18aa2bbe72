"""A trained model in Python: what `omnimix.load` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import LanguageModel
from ..backbones.heads.classification import split_tokens
from ..errors import CheckpointError, ConfigError, UnsupportedCall, UnsupportedShape
from ..modalities import load_model, save_model
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
        batch: dimensions of an array of many inputs; 0 where a single one may have as many as many have.
        axes: the sides of a map of features, from the grid (t, h, w) of the tokens.
        prepare: an input that is a tensor, prepared.
    """

    preprocess: type[Preprocess]
    noun: str
    suffixes: frozenset[str]
    batch: int
    axes: Callable[[tuple[int, int, int]], tuple[int, ...]]
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


def _of_sound(grid: tuple[int, int, int]) -> tuple[int, ...]:
    """Time alone, or time and frequency where the tokens are patches."""
    sides = [side for side in grid if side > 1]
    return tuple(sides) if sides else (1,)


_KINDS: dict[type[Classifier], _Kind] = {
    ImageClassifier: _Kind(
        ImagePreprocess, "images", IMAGE_SUFFIXES, 4, lambda grid: grid[1:], lambda p, image: p.load(image)
    ),
    VideoClassifier: _Kind(VideoPreprocess, "videos", VIDEO_SUFFIXES, 5, tuple, _clip),
    AudioClassifier: _Kind(AudioPreprocess, "audio files", AUDIO_SUFFIXES | VIDEO_SUFFIXES, 0, _of_sound, _wave),
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
        preprocess: how its inputs are prepared: an `ImagePreprocess`, `VideoPreprocess` or `AudioPreprocess`.

    Raises:
        ConfigError: a model of another kind, or a preprocessing for another model.

    Example:
        >>> predictor = omnimix.load("runs/demo")
        >>> predictor.predict("digit.png")[0].label
        '7'
    """

    def __init__(self, model: Any, preprocess: Preprocess):
        kind = next((kind for base, kind in _KINDS.items() if isinstance(model, base)), None)
        if kind is None or not isinstance(preprocess, kind.preprocess):
            known = ", ".join(f"{base.__name__} with {kind.preprocess.__name__}" for base, kind in _KINDS.items())
            given = f"{type(model).__name__} with {type(preprocess).__name__}"
            raise ConfigError(f"a predictor is made of {known}; given is {given}")
        for name, (own, trained) in preprocess.told_twice(model).items():
            if own != trained:
                raise ConfigError(f"preprocess: {name} is {own}, and the model has {trained}")
        self.model = model.eval()
        self.preprocess = preprocess
        self._kind = kind

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

    def features(self, inputs: Any, *, pooled: bool = True, batch_size: int = 32) -> Tensor:
        """What the model sees in its inputs, before the classes: for retrieval, clustering, or a model of one's own.

        Args:
            inputs: as `predict` takes them; without `pooled` all of one size.
            pooled: one vector for each input; otherwise a map of vectors.
            batch_size: how many inputs run through the model together.

        Returns:
            (n, d), or maps (n, d, h, w) of images, (n, d, t, h, w) of videos and of audio (n, d, t), or (n, d, t, f)
            where its tokens are patches; without n for a single input. float32, on the CPU.

        Raises:
            ConfigError: `batch_size` is below 1, or there are no inputs.
            UnsupportedShape: inputs as `predict` refuses them, or maps of several sizes.
            UnsupportedCall: the model merges tokens, which leaves no map.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        many = self._many(inputs)
        batches = _batches([inputs] if many is None else many, batch_size)
        found = [part for batch in batches for part in self._features(batch, pooled)]
        if not found:
            raise ConfigError("inputs is empty; there is nothing to look at")
        if len({part.shape for part in found}) > 1:
            raise UnsupportedShape("inputs: their maps differ in size; give inputs of one size, or take pooled=True")
        return found[0] if many is None else torch.stack(found)

    @torch.inference_mode()
    def _features(self, inputs: Sequence[Any], pooled: bool) -> list[Float[Tensor, " *d"]]:
        prepared = self._batch(inputs)
        if isinstance(prepared, list) and not pooled:
            return [part for one in inputs for part in self._features([one], False)]
        tokens, layout = self.model.forward_features(prepared)
        if pooled:
            return list(self.model.head.features(tokens, layout).float().cpu())
        grid, _ = split_tokens(tokens, layout)
        shape: Any = layout.grid or (grid.shape[1], 1, 1)
        if math.prod(shape) != grid.shape[1]:
            raise UnsupportedCall("this model merges tokens, which leaves no map; take pooled=True")
        return list(grid.mT.unflatten(-1, self._kind.axes(shape)).float().cpu())

    def save(self, folder: str | Path) -> None:
        """Write the model and its preprocessing into a folder that `omnimix.load` takes."""
        save_model(self.model, folder, details={"preprocess": self.preprocess.to_dict()})

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
        if isinstance(inputs, Tensor | np.ndarray):
            return list(inputs) if inputs.ndim == self._kind.batch else None
        return inputs if isinstance(inputs, list | tuple | Iterator) else None

    def _batch(self, inputs: Sequence[Any]) -> Tensor | list[Tensor]:
        """Inputs as the model takes them; clips of several lengths it packs."""
        prepared = [self._prepared(_as_tensor(one)).to(self.device) for one in inputs]
        return torch.stack(prepared) if len({one.shape for one in prepared}) == 1 else prepared

    @torch.inference_mode()
    def _logits(self, inputs: Sequence[Any]) -> Float[Tensor, "b classes"]:
        return self.model(self._batch(inputs)).float().cpu()

    def _prepared(self, one: Any) -> Tensor:
        return self._kind.prepare(self.preprocess, one) if isinstance(one, Tensor) else self.preprocess.load(one)

    def _ranked(self, logits: Float[Tensor, " classes"], top: int) -> list[Prediction]:
        values, indices = logits.softmax(-1).topk(min(top, len(self.classes)))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        return [Prediction(self.classes[index], index, value) for index, value in pairs]


def load(source: str | Path, *, device: str = "cpu") -> Predictor | TextGenerator:
    """A trained model that is ready to be used: with its preprocessing, or its tokenizer.

    Args:
        source: a run by its name under `runs/` or its directory; a directory that `Predictor.save` or
            `TextGenerator.save` wrote; or the `model.safetensors` in either. It may be a stranger's: nothing in it is
            imported or executed.
        device: where the model runs.

    Returns:
        A `Predictor` of classifiers, a `TextGenerator` of language models.

    Raises:
        CheckpointError: no such run or directory, it is corrupt, or it does not say how inputs were prepared.
        ConfigError: there is no such device.
    """
    place = usable_device(device)
    folder = Path(source)
    if folder.is_file():
        if folder.name != WEIGHTS:
            raise CheckpointError(
                f"{str(folder)!r} does not say by itself how inputs were prepared; give the directory of a run, or the "
                f"{WEIGHTS} in it"
            )
        source = folder = folder.parent
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
    if not isinstance(given, np.ndarray):
        return given
    array = torch.from_numpy(given.copy())
    return array.movedim(-1, -3) if array.ndim >= 3 and array.shape[-1] in (1, 3, 4) else array


def _batches(inputs: Iterable[Any], size: int) -> Iterator[list[Any]]:
    inputs = iter(inputs)
    while batch := list(islice(inputs, size)):
        yield batch
