"""What timm's models reach on the same images, with its optimiser, schedule and augmentation, as in its train.py."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.data.sources import IMAGE_SUFFIXES, FolderSource

# Of AdamW at the batch size used; the best by validation counts.
RATES = (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a model of timm reached.

    Args:
        name: of the model.
        rate: its learning rate.
        parameters: its size.
        val, test: accuracy on either split.
        seconds: of processor time, of this training alone.
    """

    name: str
    rate: float
    parameters: int
    val: float
    test: float
    seconds: float


def deit(size: int, patch: int, dim: int, depth: int) -> dict[str, Any]:
    """The arguments of timm's `create_model` for a DeiT-tiny of another width and depth, with heads of 32 channels."""
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": dim // 32}
    return {"model_name": "deit_tiny_patch16_224", **sizes}


def train(root: Path, model: dict[str, Any], *, size: int, epochs: int, batch: int, rate: float) -> Peer:
    """Train a model of timm on class folders, and evaluate it as it is at the end.

    Args:
        root: with train, val and test.
        model: arguments of timm's `create_model`.
        size: side of the images.
        rate: the peak of the learning rate.
    """
    import timm
    import timm.optim
    from timm.data.transforms_factory import create_transform
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    # timm does not say that it exports this function, which its train.py imports from here.
    factory: Any = timm.optim
    torch.manual_seed(0)
    splits = {split: _images(root / split) for split in ("train", "val", "test")}
    images, labels = splits["train"]
    net: Any = timm.create_model(num_classes=int(labels.max()) + 1, **model)
    optimizer: Any = factory.create_optimizer_v2(net, opt="adamw", lr=rate, weight_decay=0.05)
    schedule: Any = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=min(5, epochs // 4), warmup_lr=1e-5, min_lr=1e-5
    )[0]
    augment: Any = create_transform(size, is_training=True)
    start = _processor_seconds()
    for epoch in range(epochs):
        net.train()
        schedule.step(epoch)
        order = torch.randperm(len(images))
        for at in range(0, len(order) - batch + 1, batch):
            index = order[at : at + batch].tolist()
            inputs = torch.stack([augment(images[i]) for i in index])
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(inputs).float(), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = _processor_seconds() - start
    plain: Any = create_transform(size, crop_pct=1.0)
    found = {split: _accuracy(net, plain, *splits[split]) for split in ("val", "test")}
    parameters = sum(p.numel() for p in net.parameters())
    return Peer(name=model["model_name"], rate=rate, parameters=parameters, seconds=seconds, **found)


def best(root: Path, model: dict[str, Any], *, size: int, epochs: int, batch: int) -> list[Peer]:
    """One training for each of the RATES, that of the best validation first."""
    runs = [train(root, model, size=size, epochs=epochs, batch=batch, rate=rate) for rate in RATES]
    return sorted(runs, key=lambda run: -run.val)


def _images(folder: Path) -> tuple[list[Any], Tensor]:
    from PIL import Image

    source = FolderSource(folder, IMAGE_SUFFIXES)
    images = [Image.open(source.media(i)).convert("RGB") for i in range(len(source))]
    return images, torch.tensor([source.label(i) for i in range(len(source))])


@torch.no_grad()
def _accuracy(net: Any, transform: Any, images: list[Any], labels: Tensor) -> float:
    net.eval()
    right = 0
    for at in range(0, len(images), 100):
        inputs = torch.stack([transform(image) for image in images[at : at + 100]])
        with torch.autocast("cpu", torch.bfloat16):
            right += int((net(inputs).argmax(1) == labels[at : at + 100]).sum())
    return right / len(images)


def _processor_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
