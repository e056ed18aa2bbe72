"""Models that begin with images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...backbones import BackboneConfig, list_mixers
from ...backbones.heads import ClassificationHeadConfig
from ...backbones.typed import Config
from ...errors import ConfigError
from ..common.classifier import Classifier, Pool, parted, plain_backbone
from .tokenizer import PatchTokenizer, PatchTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class ImageClassifierConfig(Config):
    """An image classifier: tokenizer, backbone and head, whose widths agree."""

    image: PatchTokenizerConfig
    backbone: BackboneConfig
    head: ClassificationHeadConfig

    def __post_init__(self) -> None:
        if self.image.dim != self.backbone.dim:
            raise ConfigError(f"image.dim is {self.image.dim} and backbone.dim {self.backbone.dim}; they must be equal")
        if self.head.pool == "class_token" and self.image.class_token is None:
            raise ConfigError("head.pool is 'class_token', but image.class_token is None; set 'first' or 'middle'")

    def resized(self, size: int | tuple[int, int]) -> ImageClassifierConfig:
        """The configuration for images of another size."""
        return replace(self, image=replace(self.image, size=size))


class ImageClassifier(Classifier):
    """Images of any size to logits.

    `forward` takes images (b, c, h, w), floating point, normalised as the model was trained.
    """

    config_class = ImageClassifierConfig
    tokenizer: PatchTokenizer

    @classmethod
    def examples(cls) -> list[tuple[ImageClassifierConfig, list[Tensor]]]:
        small: dict[str, Any] = {"dim": 16, "depth": 2, "classes": 3, "size": 16, "patch": 4}
        images = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 9, 23)]
        options: list[dict[str, Any]] = [
            {"mixer": "gla"},
            {"mixer": "gla", "stem": "conv"},
            {"mixer": "attention", "class_token": "middle", "pool": "class_token", "positions": "factorised"},
            {"mixer": "mamba2,attention", "pool": "max", "positions": "none"},
        ]
        return [(image_classifier(**small | option), images) for option in options]

    def __init__(self, config: ImageClassifierConfig):
        super().__init__(PatchTokenizer(config.image), config.backbone, config.head)

    @property
    def config(self) -> ImageClassifierConfig:
        """The configuration that builds this model as it is now, resized or with another head."""
        return ImageClassifierConfig(image=self.tokenizer.config, backbone=self.backbone.config, head=self.head.config)


def image_classifier(
    backbone: BackboneConfig | None = None,
    *,
    classes: int = 1000,
    pool: Pool = "mean",
    dropout: float = 0.0,
    **options: Any,
) -> ImageClassifierConfig:
    """The configuration of a classifier around any backbone; plain and ViT-shaped from its short form.

    Attention has no rotary positions where the tokenizer gives learned ones.

    Args:
        backbone: the whole configuration, or None for the short form.
        options: fields of `PatchTokenizerConfig` (size, patch, channels, positions, class_token, registers, stem), and
            the short form of the backbone: see `plain_backbone`.

    Raises:
        UnknownName, ConfigError: unknown names, and parts that do not fit together.
    """
    image, short = parted(options, {field.name for field in fields(PatchTokenizerConfig)} - {"dim"})
    positions = image.get("positions", PatchTokenizerConfig.positions) != "none"
    backbone = plain_backbone(backbone, positions=positions, **short)
    return ImageClassifierConfig(
        image=PatchTokenizerConfig(dim=backbone.dim, **image),
        backbone=backbone,
        head=ClassificationHeadConfig(classes=classes, pool=pool, dropout=dropout),
    )


# ViG, published with 6, 23 and 89 million parameters (arXiv 2405.18425, table 2).
VISION_MODELS: dict[str, dict[str, Any]] = {
    "vig_tiny_patch16_224": {"mixer": "gla", "dim": 192, "depth": 12},
    "vig_small_patch16_224": {"mixer": "gla", "dim": 384, "depth": 12},
    "vig_base_patch16_224": {"mixer": "gla", "dim": 768, "depth": 12},
} | {f"vit_tiny_{mixer}_patch16_224": {"mixer": mixer, "dim": 192, "depth": 12} for mixer in list_mixers()}
