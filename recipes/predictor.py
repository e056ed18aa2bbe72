"""A trained model in Python: what `omnimix.load` returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import LanguageModel
from ..errors import CheckpointError, ConfigError
from ..modalities import load_model
from ..modalities.audio.model import AudioClassifier
from ..modalities.common.weights import CONFIG, WEIGHTS
from ..modalities.data.sources import walk_files
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

# Class of models -> how its inputs are prepared.
PREPROCESS: dict[type[torch.nn.Module], type[Preprocess]] = {
    ImageClassifier: ImagePreprocess,
    VideoClassifier: VideoPreprocess,
    AudioClassifier: AudioPreprocess,
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
            files = walk_files(Path(inputs), self.preprocess.suffixes)
            if not files:
                raise ConfigError(f"inputs is {str(inputs)!r}, a directory without {self.preprocess.noun}")
            return files
        return inputs if isinstance(inputs, list | tuple | Iterator) else None

    @torch.inference_mode()
    def _logits(self, inputs: Sequence[Any]) -> Float[Tensor, "b classes"]:
        prepared = [self.preprocess.load(_as_tensor(one)).to(self.device) for one in inputs]
        return self.model(self.preprocess.collate(prepared)).float().cpu()

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
    for kind, preprocess in PREPROCESS.items():
        if isinstance(model, kind):
            return Predictor(model, preprocess.of_model(folder, model)).to(place)
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
