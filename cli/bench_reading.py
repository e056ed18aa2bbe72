"""Times reading images from shards and folders, compared with torchvision's ImageFolder: `omnimix bench reading`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import ConfigError
from ..modalities.data.sources import IMAGE_SUFFIXES, Source, find_source
from ..modalities.image.files import load_image
from ..recipes.common.loading import EpochLoader
from ..recipes.common.media import Samples, collate
from ..recipes.common.synthetic import generated_folder
from ..utils.console import emit
from ..utils.options import add_json, summary
from .shard import shard_folder

CLASSES = 10
SHARD = 128
PEER = "torchvision ImageFolder"
_VERSION = 1


def make_images(folder: Path, count: int, size: int) -> None:
    """Fill `folder/files/train/CLASS` with JPEGs, each a bright shape in soft noise, and `folder/shards` with the same.

    As files they are about as large as photographs of `size` pixels (quality 90).
    """
    from PIL import Image, ImageDraw

    for index in range(count):
        rng = np.random.default_rng(index)
        noise = Image.fromarray(rng.integers(40, 216, (8, 8, 3), np.uint8))
        soft = noise.resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(soft).astype(np.float32) + rng.normal(0, 8, (size, size, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        place, side = rng.integers(0, size // 2, 2), size // 4 + index % CLASSES
        box = [*place.tolist(), *(place + side).tolist()]
        draw = ImageDraw.Draw(image)
        (draw.ellipse if index % 2 else draw.rectangle)(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
        file = folder / "files" / "train" / f"class{index % CLASSES}" / f"{index:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=90)
    shard_folder(folder / "files", folder / "shards", kind="image", samples=SHARD)


class Load:
    """What a sample of ours is made of: a file or its bytes, decoded and transformed."""

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        self.transform = transform

    def __call__(self, media: Path | bytes, seed: int | None) -> dict[str, Tensor]:
        return {"image": self.transform(load_image(media, keep_bytes=True))}


MEAN, STD = [0.5] * 3, [0.25] * 3


def transforms(size: int) -> Any:
    """What ours do to a decoded image (c, h, w) of bytes, as training does."""
    from torchvision.transforms import v2

    crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def usual_transforms(size: int) -> Any:
    """The same in the order of torchvision's own examples: what is cropped and resized is a PIL image."""
    from torchvision import transforms as tv

    crop = [tv.RandomResizedCrop(size), tv.RandomHorizontalFlip()]
    return tv.Compose([*crop, tv.ToTensor(), tv.Normalize(MEAN, STD)])


def images_per_second(loader: Any, epoch: int) -> float:
    """Measure one pass over everything, the start of the pass included."""
    if isinstance(loader, EpochLoader):
        loader.set_epoch(epoch)
    start, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return count / (time.perf_counter() - start)


def loaders_of(folder: Path, size: int, workers: int, batch: int) -> dict[str, Any]:
    """The readers by name, with the same transforms, workers and batches."""
    from torchvision.datasets import ImageFolder

    transform = transforms(size)

    def ours(source: Source) -> EpochLoader:
        samples = Samples(source, Load(transform), seed=0)
        return EpochLoader(samples, batch_size=batch, shuffle=True, workers=workers, collate=collate)

    return {
        "omnimix shards": ours(find_source(folder / "shards", "train", IMAGE_SUFFIXES)),
        "omnimix folders": ours(find_source(folder / "files", "train", IMAGE_SUFFIXES)),
        PEER: DataLoader(
            ImageFolder(str(folder / "files" / "train"), usual_transforms(size)),
            batch_size=batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        ),
    }


def bench_reading(
    *, images: int = 500, size: int = 160, workers: int = 2, batch: int = 64, seconds: float = 60.0
) -> list[dict[str, Any]]:
    """One row a reader: the median over passes that alternate between the readers, after one each that is not timed.

    Args:
        images: how many, made once and kept in the cache. Few make short passes and many of them, which a busy
            machine disturbs less.
        size: their side, and the side that they are cropped to, in pixels.
        workers: processes that read ahead.
        batch: images a batch.
        seconds: after which no further round begins; there are at least three.

    Raises:
        ConfigError: a number that is too small.
    """
    if size < 16 or workers < 0 or batch < 1 or images < max(batch, CLASSES):
        raise ConfigError(
            f"images {images}, size {size}, workers {workers} and batch {batch}: there must be at least a batch of "
            f"images, {CLASSES} of them, 16 pixels wide, and no fewer workers than 0"
        )
    name = f"reading-{images}-{size}-v{_VERSION}"
    folder = generated_folder(name, lambda beside: make_images(beside, images, size))
    loaders = loaders_of(folder, size, workers, batch)
    for loader in loaders.values():
        images_per_second(loader, 0)
    rates: dict[str, list[float]] = {reader: [] for reader in loaders}
    start, epoch = time.perf_counter(), 0
    while epoch < 3 or time.perf_counter() - start < seconds:
        epoch += 1
        # Each reader is first as often as last: what else the machine does changes slowly.
        for reader in list(loaders)[:: 1 if epoch % 2 else -1]:
            rates[reader].append(images_per_second(loaders[reader], epoch))
    return [
        {
            "reader": reader,
            "workers": workers,
            "batch": batch,
            "images/s": round(statistics.median(rates[reader]), 1),
            "passes": len(rates[reader]),
            f"x {PEER}": round(statistics.median(a / b for a, b in zip(rates[reader], rates[PEER], strict=True)), 3),
        }
        for reader in loaders
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench reading`."""
    parser = argparse.ArgumentParser(prog="omnimix bench reading", description=summary(__doc__))
    parser.add_argument("--images", type=int, default=500, help="JPEG files, made once and kept (default: 500)")
    parser.add_argument("--size", type=int, default=160, metavar="PIXELS", help="side of the images (default: 160)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read ahead (default: 2)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: 64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure for (default: 60)")
    add_json(parser)
    options = parser.parse_args(argv)
    names = ("images", "size", "workers", "batch", "seconds")
    rows = bench_reading(**{name: getattr(options, name) for name in names})
    emit(f"reading JPEGs of {options.size} x {options.size} pixels, cropped, flipped, normalised", rows, options.json)
    return 0
