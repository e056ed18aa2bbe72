"""Preprocessing of images, saved with every model so that inference repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...modalities.common.classifier import Classifier
from ...modalities.image.files import load_image
from ...modalities.image.squares import resized_square
from ..common.preprocess import Preprocess, check_square, check_statistics


@dataclass(frozen=True, kw_only=True)
class ImagePreprocess(Preprocess):
    """Preprocessing of an image file.

    Args:
        size: side of the square that the model sees.
        channels: 1 (grey) or 3.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        crop: the fraction of the shorter side that is kept.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_square(self)
        check_statistics(self)

    def of_the_model(self, model: Classifier) -> dict[str, tuple[Any, Any]]:
        config = model.config.image
        return {"channels": (self.channels, config.channels), "size": ((self.size, self.size), config.size)}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.size, self.size

    def load(self, source: object) -> Float[Tensor, "c h w"]:
        """Read an image, resize its shorter side, crop the centre and normalise.

        Raises:
            MediaError: the file cannot be read.
        """
        image = load_image(source, "L" if self.channels == 1 else "RGB")
        return self.normalise(resized_square(image, self.size, round(self.size / self.crop)))

    def normalise(self, images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std

    def restore(self, images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """The inverse of `normalise`, in 0..1, to look at."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)
