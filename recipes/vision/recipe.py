"""Image classification: `omnimix vision fit`, `validate` and `test`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...backbones import BackboneConfig
from ...backbones.config import not_negative
from ...modalities import ImageClassifier
from ...modalities.image.model import image_classifier
from ..common.classification import Classification, ClassificationTrainingConfig, Look, finish
from ..common.cli import NOTHING, RecipeCLI
from ..common.commands import evaluate, run_fit
from ..common.training import EvenSteps, parts
from .data import DigitsData, ImageData, TensorData
from .folders import ImageFolderData
from .rules import VISION_RULE

RECIPE = "vision_classification"
__all__ = ["DigitsData", "ImageFolderData", "TensorData", "VisionClassification"]


@dataclass(frozen=True, kw_only=True)
class VisionTrainingConfig(ClassificationTrainingConfig):
    """How the weights of an image classifier are found; see `ClassificationTrainingConfig` for the rest.

    Args:
        mixup: strength (alpha) of mixing pairs of samples; 0 is never.
        cutmix: strength (alpha) of pasting one sample into another; 0 is never.
        mix_probability: the fraction of steps that mix.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        parts(self, "mix_probability")
        not_negative(self, "mixup", "cutmix")


_BACKBONE = BackboneConfig(dim=64, depth=4, pattern=("gla",), scan="bidirectional")


class VisionClassification(EvenSteps, Classification):
    """An image classifier and how it is trained.

    Args:
        backbone: the configuration of the blocks; see `BackboneConfig`.
        patch: side of a patch in pixels; null gives 8 to 15 patches along a side, and small images fewer.
        stem: how pixels become tokens: "patch", one product a patch, or "conv", small convolutions.
        stem_depth: residual blocks at each scale of the stem "conv".
        position_std: of the position embeddings at the beginning. Patches without overlap need some as large as
            themselves: starting at 0.02, a small data set needs many epochs to find out where things are.
        training: optimiser, schedule, regularisation and averaging.
        classes: number of classes; the data says it.
        in_channels: 1 or 3; the data says it.
        image_size: side of the images; the data says it.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig = _BACKBONE,
        patch: int | None = None,
        stem: Literal["patch", "conv"] = "patch",
        stem_depth: int = 1,
        position_std: float = 1.0,
        training: VisionTrainingConfig = VisionTrainingConfig(),
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
    ):
        config = image_classifier(
            backbone,
            classes=classes,
            size=image_size,
            patch=patch_for(image_size) if patch is None else patch,
            channels=in_channels,
            stem=stem,
            stem_depth=stem_depth,
        )
        model = ImageClassifier(config)
        assert model.tokenizer.positions is not None
        torch.nn.init.trunc_normal_(model.tokenizer.positions, std=position_std)
        super().__init__(model, input_name="image", training=training, classes=classes)
        self._mixing = mixing(training, classes)

    def varied(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs, labels) if self._mixing is None else self._mixing(inputs, labels)


def patch_for(size: int) -> int:
    """The power of two, at least 2, that gives 8 to 15 patches along a side; fewer where the image is small."""
    patch = 2
    while size // (2 * patch) >= 8:
        patch *= 2
    return patch


def mixing(training: VisionTrainingConfig, classes: int) -> Any:
    """Mixup and CutMix of torchvision as configured, or None; they sample from the global generator."""
    from torchvision.transforms import v2

    ways: list[Any] = []
    # Their distributions look at their own values, which a model that is made without memory would not have.
    with torch.device("cpu"):
        if training.mixup > 0:
            ways.append(v2.MixUp(alpha=training.mixup, num_classes=classes))
        if training.cutmix > 0:
            ways.append(v2.CutMix(alpha=training.cutmix, num_classes=classes))
    if not ways:
        return None
    share = training.mix_probability
    return v2.RandomChoice([*ways, v2.Identity()], p=[*(share / len(ways) for _ in ways), 1 - share])


def fit(argv: list[str], objects: Mapping[str, Any] = NOTHING) -> int:
    """`omnimix vision fit`."""
    return run_fit("vision", argv, partial(make_cli, objects=objects), _finish)


# What the data says -> the argument of the model.
LINKS = [("classes", "classes"), ("in_channels", "in_channels"), ("image_size", "image_size")]


def make_cli(command: str, argv: list[str], objects: Mapping[str, Any] = NOTHING) -> RecipeCLI:
    """The command line of a subcommand; see `RecipeCLI`."""
    return RecipeCLI(
        command,
        model=VisionClassification,
        data=ImageData,
        recipe=RECIPE,
        argv=argv,
        objects=objects,
        links=LINKS,
        monitor="val/acc1",
        mode="max",
        rule=VISION_RULE,
    )


def _finish(cli: RecipeCLI) -> None:
    finish(cli, Look(noun="images", picture=cli.datamodule.preprocess.restore))


def validate(argv: list[str]) -> int:
    """`omnimix vision validate`."""
    return evaluate("validate", argv, make_cli)


def test(argv: list[str]) -> int:
    """`omnimix vision test`."""
    return evaluate("test", argv, make_cli)
