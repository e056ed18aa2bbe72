"""Image data from folders of files, one folder a class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from ...modalities.data.sources import IMAGE_SUFFIXES, find_splits
from ...modalities.image.files import load_image
from ..common.media import Samples
from ..common.options import LOADING, LoadingOptions
from .data import ImageData
from .preprocess import ImagePreprocess


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of a training image, or of all frames of a clip alike.

    Args:
        scale: the smallest fraction of the area that a random crop keeps.
        flip: whether to mirror images with a probability of 0.5.
        colour: strength of random brightness, contrast and saturation.
        rotate: the largest angle, in degrees; what lies outside is mirrored in.
    """

    scale: float = 0.35
    flip: bool = True
    colour: float = 0.0
    rotate: float = 0.0

    def __call__(self, image: Shaped[Tensor, "*t c h w"], size: int, seed: int) -> Shaped[Tensor, "*t c s s"]:
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomResizedCrop(size, scale=(self.scale, 1.0), antialias=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.colour > 0:
            steps.append(v2.ColorJitter(self.colour, self.colour, self.colour))
        # torchvision samples from the global generator, which is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = v2.Compose(steps)(image)
            return _rotated(image, self.rotate * (2 * float(torch.rand(())) - 1)) if self.rotate else image


def _rotated(image: Shaped[Tensor, "*t c s s"], degrees: float) -> Float[Tensor, "*t c s s"]:
    """The image, or all frames, turned about the centre, in 0..1."""
    image = image.float().div_(255) if image.dtype == torch.uint8 else image
    frames = image if image.ndim == 4 else image[None]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    grid = F.affine_grid(frames.new_tensor([[[cos, -sin, 0], [sin, cos, 0]]]), [1, *frames.shape[1:]], False)
    turned = F.grid_sample(frames, grid.expand(len(frames), -1, -1, -1), padding_mode="reflection", align_corners=False)
    return turned.view(image.shape)


class LoadImage:
    """A sample from an image file: `image` (c, h, w).

    Args:
        preprocess: of held-out images, and the normalisation of all.
        augment: augmentation of training images.
    """

    def __init__(self, preprocess: ImagePreprocess, augment: Augment | None = None):
        self.preprocess, self.augment = preprocess, augment

    def __call__(self, media: Path | bytes, seed: int | None) -> dict[str, Float[Tensor, "c h w"]]:
        if self.augment is None or seed is None:
            return {"image": self.preprocess.load(media)}
        raw = load_image(media, "L" if self.preprocess.channels == 1 else "RGB", keep_bytes=True)
        image = self.augment(raw, self.preprocess.size, seed)
        image = image.float().div_(255) if image.dtype == torch.uint8 else image
        return {"image": self.preprocess.normalise(image)}


class ImageFolderData(ImageData):
    """Your own images, in any of the layouts of `find_source`: one folder a class (`root/train/CLASS/*.jpg`), tables
    (`root/train.csv`) or tar shards (`root/train-*.tar`); the same with `val`, and perhaps `test`.

    Classes are those of the training images.

    Args:
        root: the folder.
        size: side of the square that the model sees.
        channels: 3, or 1 for grey.
        augment: augmentation of training images.
        crop: the fraction of the shorter side that is kept of held-out images.
        loading: the options of all data sets except `keep`.
    """

    defaults = replace(ImageData.defaults, workers=2)
    fixed: ClassVar[dict[str, str]] = {"keep": "each epoch crops its files anew"}

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        channels: Literal[1, 3] = 3,
        augment: Augment = Augment(),
        crop: float = 0.9,
        loading: LoadingOptions = LOADING,
    ):
        super().__init__(loading=loading)
        self.root, self.augment = Path(root), augment
        self.sources = find_splits(self.root, IMAGE_SUFFIXES)
        self.preprocess = ImagePreprocess(
            classes=self.sources["train"].classes,
            size=size,
            channels=channels,
            # ImageNet's statistics, which every public image model uses.
            mean=(0.485, 0.456, 0.406) if channels == 3 else (0.449,),
            std=(0.229, 0.224, 0.225) if channels == 3 else (0.226,),
            crop=crop,
        )

    def setup(self, stage: str) -> None:
        for split, source in self.sources.items():
            augmented = split == "train"
            load = LoadImage(self.preprocess, self.augment if augmented else None)
            setattr(self, f"{split}_set", Samples(source, load, seed=self.loading.seed if augmented else None))
