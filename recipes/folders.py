"""Image data from folders of files, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, MediaError
from ..modalities.image import load_image
from .data import ImageData
from .loading import Key, mix
from .predict import image_files
from .preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to a training image from a file.

    Args:
        scale: the smallest part of the area that a random crop keeps.
        flip: whether to mirror every other image.
        colour: strength of random brightness, contrast and saturation.
    """

    scale: float = 0.35
    flip: bool = True
    colour: float = 0.0

    def __call__(self, image: Float[Tensor, "c h w"], size: int, seed: int) -> Float[Tensor, "c s s"]:
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomResizedCrop(size, scale=(self.scale, 1.0), antialias=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.colour > 0:
            steps.append(v2.ColorJitter(self.colour, self.colour, self.colour))
        # torchvision draws from the global generator; it is lent to this image only.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return v2.Compose(steps)(image)


class FolderImages:
    """Image files with labels, decoded one by one."""

    def __init__(
        self, files: Sequence[tuple[str, int]], preprocess: Preprocess, *, augment: Augment | None = None, seed: int = 0
    ):
        self.files, self.preprocess, self.augment, self.seed = list(files), preprocess, augment, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        path, label = self.files[index]
        try:
            if self.augment is None:
                image = self.preprocess.load(path)
            else:
                raw = load_image(path, "L" if self.preprocess.channels == 1 else "RGB")
                image = self.preprocess.normalise(self.augment(raw, self.preprocess.size, mix(self.seed, epoch, index)))
        except MediaError as error:
            return {"image": None, "label": label, "problem": (path, str(error))}
        return {"image": image, "label": label, "problem": None}


class ImageFolderData(ImageData):
    """Image files in one folder a class: `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg`, perhaps `root/test/...`.

    Classes are the folders of `root/train`, in alphabetical order.

    Args:
        root: the folder.
        size: side of the square that the model sees.
        channels: 3, or 1 for grey.
        batch_size: images a step, on each device.
        workers: processes that decode.
        seed: of order and augmentation.
        policy: what an unreadable file does: "skip" leaves it out and names it at the end, "raise" stops.
        augment: what happens to training images.
        crop: the part of the shorter side that is kept of held-out images.
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        channels: Literal[1, 3] = 3,
        batch_size: int = 64,
        workers: int = 2,
        seed: int = 0,
        policy: Literal["skip", "raise"] = "skip",
        augment: Augment = Augment(),
        crop: float = 0.9,
    ):
        super().__init__(batch_size=batch_size, workers=workers, seed=seed, policy=policy)
        self.root, self.augment = Path(root), augment
        folder = self.root / "train"
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
        if not classes:
            raise ConfigError(f"data.root is {root!r}; it needs train/CLASS/*.jpg and val/CLASS/*.jpg")
        self.preprocess = Preprocess(
            classes=tuple(classes),
            size=size,
            channels=channels,
            # ImageNet's statistics, which every public image model uses.
            mean=(0.485, 0.456, 0.406) if channels == 3 else (0.449,),
            std=(0.229, 0.224, 0.225) if channels == 3 else (0.226,),
            crop=crop,
        )

    def setup(self, stage: str) -> None:
        self.train_set = FolderImages(self.files("train"), self.preprocess, augment=self.augment, seed=self.seed)
        self.val_set = FolderImages(self.files("val"), self.preprocess)
        if (self.root / "test").is_dir():
            self.test_set = FolderImages(self.files("test"), self.preprocess)

    def files(self, split: str) -> list[tuple[str, int]]:
        """The image files of a split with their labels, in alphabetical order.

        Raises:
            ConfigError: no images, or a class that `root/train` does not have.
        """
        label = {name: i for i, name in enumerate(self.preprocess.classes)}
        found = [
            (path, path.relative_to(self.root / split).parts[0])
            for path in image_files(self.root / split)
            if path.parent != self.root / split
        ]
        unknown = sorted({name for _, name in found} - set(label))
        if unknown:
            raise ConfigError(f"{self.root / split} has classes that {self.root / 'train'} lacks: {', '.join(unknown)}")
        if not found:
            raise ConfigError(f"{self.root / split} holds no images in class folders")
        return [(str(path), label[name]) for path, name in found]
