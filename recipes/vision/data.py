"""Image data for the recipes: what every data set shares, handwritten digits, tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError
from ...modalities.common.values import check_pixels
from ..common.loading import Key, own_key, uniform
from ..common.media import IGNORED, MediaData
from ..common.options import LOADING, LoadingOptions, Reader
from .preprocess import ImagePreprocess


class ImageData(MediaData):
    """Base of the image data sets, whose batches have their images (b, c, h, w) as `image`."""

    preprocess: ImagePreprocess

    @classmethod
    def reader_of(cls, path: Path) -> Reader:
        if path.is_dir():
            return Reader("ImageFolderData", {"root": path}, "vision_folder")
        if path.suffix in (".safetensors", ".pt", ".pth"):
            return Reader("TensorData", {"path": path})
        raise ConfigError(f"data is {str(path)!r}; name a folder of images by class, or a .safetensors file of tensors")

    @property
    def in_channels(self) -> int:
        return self.preprocess.channels

    @property
    def image_size(self) -> int:
        return self.preprocess.size


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random geometry for images in memory.

    Args:
        rotate: the largest angle, in degrees.
        shift: the largest shift, as a fraction of the side.
        scale: the largest change of size, as a fraction, up or down.
        flip: whether to mirror images with a probability of 0.5.
    """

    rotate: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    flip: bool = False

    def __call__(self, images: Float[Tensor, "b c h w"], u: Float[Tensor, "b 5"]) -> Float[Tensor, "b c h w"]:
        """The images, moved by `u`, numbers in [0, 1)."""
        if self == Jitter():
            return images
        centred = 2 * u - 1
        angle = torch.deg2rad(self.rotate * centred[:, 0])
        size = 1 + self.scale * centred[:, 1]
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(cos)
        shift = 2 * self.shift * centred[:, 2:4]
        affine = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False, padding_mode="zeros")


class TensorImages:
    """Images in memory, read and augmented a batch at a time."""

    def __init__(
        self,
        images: Float[Tensor, "n c h w"],
        labels: Int[Tensor, " n"],
        preprocess: ImagePreprocess,
        *,
        jitter: Jitter | None = None,
        seed: int = 0,
    ):
        self.images, self.labels, self.preprocess = images, labels, preprocess
        self.jitter, self.seed = jitter, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[Key]) -> dict[str, Any]:
        own = [own_key(key) for key in keys]
        index = torch.tensor([index for _, index in own])
        images = self.images[index]
        if self.jitter is not None:
            images = self.jitter(images, uniform(self.seed, own, 5))
        counted = torch.tensor([number >= 0 for _, number in keys])
        labels = self.labels[index].masked_fill(~counted, IGNORED)
        return {"image": self.preprocess.normalise(images), "label": labels, "problems": []}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])


class TensorData(ImageData):
    """Images and labels as tensors: in memory, or in a .safetensors or .pt file.

    Args:
        path: a file that holds `train_images` (n, c, h, w), `train_labels` (n,), `val_images`, `val_labels`, and
            perhaps `test_images`, `test_labels`. Images are floating point in 0..1, or uint8.
        tensors: the same, given in memory; instead of `path`.
        class_names: by index; numbers by default.
        jitter: augmentation of the training images.
        loading: batch_size, workers and seed; the others concern files.
    """

    defaults = replace(ImageData.defaults, policy="raise", max_unreadable=0.0)
    fixed = dict.fromkeys(("policy", "max_unreadable", "keep"), "its images lie in memory")

    def __init__(
        self,
        *,
        path: str | None = None,
        tensors: dict[str, Tensor] | None = None,
        class_names: list[str] | None = None,
        jitter: Jitter = Jitter(),
        loading: LoadingOptions = LOADING,
    ):
        super().__init__(loading=loading)
        if (path is None) == (tensors is None):
            raise ConfigError("TensorData takes one of path and tensors")
        self._splits = self._check(tensors if tensors is not None else read_tensors(Path(str(path))))
        self.jitter = jitter
        images, labels = self._splits["train"]
        names = class_names or [str(i) for i in range(int(labels.max()) + 1)]
        top = max(int(labels.max()) for _, labels in self._splits.values())
        if top >= len(names):
            raise ConfigError(f"a label is {top}, but there are {len(names)} class names")
        self.preprocess = ImagePreprocess(
            classes=tuple(names),
            size=images.shape[-1],
            channels=images.shape[1],
            mean=tuple(images.mean((0, 2, 3)).tolist()),
            std=tuple(images.std((0, 2, 3)).clamp_min(1e-3).tolist()),
        )

    @staticmethod
    def _check(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        splits = {}
        for split in ("train", "val", "test"):
            images, labels = tensors.get(f"{split}_images"), tensors.get(f"{split}_labels")
            if images is None and labels is None and split == "test":
                continue
            if images is None or labels is None:
                raise ConfigError(f"the tensors lack {split}_images or {split}_labels; there are {sorted(tensors)}")
            if images.ndim != 4 or images.shape[2] != images.shape[3] or not 0 < len(images) == len(labels):
                raise ConfigError(
                    f"{split}_images is {tuple(images.shape)} with {len(labels)} labels; it must be (n, c, size, size)"
                )
            images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            check_pixels(images, f"{split}_images")
            splits[split] = (images, labels.to(torch.int64))
        return splits

    def setup(self, stage: str) -> None:
        for split, (images, labels) in self._splits.items():
            jitter = self.jitter if split == "train" else None
            made = TensorImages(images, labels, self.preprocess, jitter=jitter, seed=self.loading.seed)
            setattr(self, f"{split}_set", made)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file, read without executing code."""
    if not path.is_file():
        raise ConfigError(f"data.path is {str(path)!r}; there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


class DigitsData(TensorData):
    """scikit-learn's handwritten digits: 1,797 real grey images of 8 x 8 pixels, from 43 people.

    Args:
        holdout: the fraction of each class that is held out, always the same images.
        jitter: augmentation of the training images.
        loading: batch_size and seed; the others concern files.
    """

    fixed = TensorData.fixed | {"workers": "its images lie in memory"}

    def __init__(
        self,
        *,
        holdout: float = 0.2,
        jitter: Jitter = Jitter(rotate=10.0, shift=0.1, scale=0.1),
        loading: LoadingOptions = LOADING,
    ):
        if not 0 < holdout < 1:
            raise ConfigError(f"holdout is {holdout}; it must be between 0 and 1")
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        labels = torch.from_numpy(digits.target).to(torch.int64)
        train, val = stratified_split(labels, holdout)
        super().__init__(
            path=None,
            tensors={
                "train_images": images[train],
                "train_labels": labels[train],
                "val_images": images[val],
                "val_labels": labels[val],
            },
            class_names=None,
            jitter=jitter,
            loading=loading,
        )


def stratified_split(labels: Int[Tensor, " n"], holdout: float) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Indices to train on and to hold out: the same fraction of every class, independent of the seed of a run."""
    generator = torch.Generator().manual_seed(0)
    train, val = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held = max(1, round(holdout * len(members)))
        val.append(members[:held])
        train.append(members[held:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values
