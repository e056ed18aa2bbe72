"""Every named image classifier as a timm model, `omnimix_<name>`.

Importing this module (`omnimix.timm_models`) registers them, and those of other media (`timm_media`);
`timm.create_model("omnimix_vig_tiny_patch16_224")` then works as for timm's own. It stands on top of the modalities and
is imported on demand only.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, Unpack, cast

from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..backbones import BackboneConfig
from ..backbones.heads.classification import split_tokens
from ..errors import ConfigError
from ..modalities import ImageClassifier, ImageClassifierConfig
from ..modalities.common.classifier import layout_of
from .private_timm import feature_take_indices
from .timm_base import TimmModel, TimmShort, checkpoint_filter_fn, chosen, models_of, pool_for, prefix_first, register
from .timm_media import TimmAudioClassifier, TimmVideoClassifier

__all__ = ["TimmAudioClassifier", "TimmClassifier", "TimmVideoClassifier", "checkpoint_filter_fn"]


class TimmClassifier(TimmModel, ImageClassifier):
    """An image classifier with timm's interface (see `TimmModel`).

    Images of any size are served, whatever `img_size` says.

    Args:
        cfg: a name from `omnimix.list_models()`.
        img_size: the size that positions are learned for.
        global_pool: "avg", "max", "token", or "" for none; by default the named model's.
        class_token: None, "first" or "middle".
        patch_size: by default the named model's.
        stem, stem_depth: as in `PatchTokenizerConfig`.
        backbone: a whole configuration in place of the named model's, or what JSON has of one.
        short: what differs from the named model's backbone; see `TimmShort`.

    Raises:
        UnknownName, ConfigError: as `omnimix.create_model`.
    """

    def __init__(
        self,
        cfg: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | list[int] = 224,
        patch_size: int | tuple[int, int] | list[int] | None = None,
        global_pool: str | None = None,
        class_token: str | None = None,
        drop_rate: float = 0.0,
        stem: Literal["patch", "conv"] = "patch",
        stem_depth: int = 1,
        backbone: BackboneConfig | dict[str, Any] | None = None,
        **short: Unpack[TimmShort],
    ):
        super().__init__(
            chosen(
                cfg,
                backbone,
                short,
                classes=num_classes,
                channels=in_chans,
                size=img_size,
                patch=patch_size,
                pool=pool_for(global_pool),
                class_token=class_token,
                dropout=drop_rate,
                stem=stem,
                stem_depth=stem_depth,
            )
        )
        self.in_chans = in_chans
        self.adopt()

    def adopt(self) -> None:
        super().adopt()
        self.feature_info, reduction = [], max(self.tokenizer.config.patch)
        for i, stage in enumerate(self.backbone.stages):
            if str(i) in self.backbone.transitions:
                reduction = round(reduction * self.backbone.transitions[str(i)].shrinks)
            for _ in range(stage.depth):
                module = f"backbone.blocks.{len(self.feature_info)}"
                self.feature_info.append({"module": module, "num_chs": stage.dim, "reduction": reduction, "stage": i})

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks in addition to the features, `(features, [intermediates])`.

        Args:
            indices: the last so many blocks, those blocks, or None for all.
            return_prefix_tokens: pairs (grid, class token and registers) instead of the grid alone.
            norm: apply the last norm to each block of the last stage.
            stop_early: compute nothing after the last block asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        tokens, entering = self.tokenizer(x)
        stages = {i: self.feature_info[i]["stage"] for i in take}
        taps = [f"blocks.{i}" for i in take] + [f"stages.{i}" for i in dict.fromkeys(stages.values())]
        out = self.backbone(tokens, entering, taps=taps, depth=last + 1 if stop_early else None)
        found: list[Any] = []
        for i, stage in stages.items():
            # The last norm is the last stage's; what earlier ones give may have another width.
            normed = norm and stage == len(self.backbone.stages) - 1
            tap, layout = out.shared[f"blocks.{i}"], out.shared[f"stages.{stage}"].layout
            grid, prefix = split_tokens(self.backbone.norm(tap) if normed else tap, layout)
            if output_fmt == "NCHW":
                grid = grid.mT.unflatten(-1, layout.grid[1:]).contiguous()
            found.append((grid, prefix) if return_prefix_tokens and layout.extra else grid)
        return found if intermediates_only else (prefix_first(out.y, layout_of(out, entering)), found)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for the given intermediates; returns their indices."""
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        self.backbone.blocks = self.backbone.blocks[: last + 1]
        width = self.backbone.stages[-1].dim
        self._keep_blocks(last + 1)
        # After an earlier stage of another width there is no norm.
        if prune_norm or self.backbone.stages[-1].dim != width:
            self.backbone.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        self.adopt()
        return take

    def _keep_blocks(self, count: int) -> None:
        """Tell the backbone that it has so many blocks, and drop the stages after them."""
        backbone, stages, left = self.backbone, [], count
        for stage in backbone.stages:
            if left > 0:
                stages.append(replace(stage, depth=min(stage.depth, left)))
            left -= stage.depth
        backbone.stages = tuple(stages)
        # A new configuration would refuse options that only dropped blocks have used.
        backbone.config = copy.copy(backbone.config)
        for name, value in (("depth", count), ("stages", backbone.stages if backbone.config.stages else ())):
            object.__setattr__(backbone.config, name, value)
        for i in [i for i in backbone.transitions if int(i) >= len(stages)]:
            del backbone.transitions[i]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize positions and, with `patch_size`, the patch kernel."""
        self.tokenizer.resize(size=img_size, patch=patch_size)
        self.adopt()
        self.record_size(self.tokenizer.config.size, patch_size=self.tokenizer.config.patch)


def _default_cfg(config: ImageClassifierConfig) -> dict[str, Any]:
    height, width = cast("tuple[int, int]", config.image.size)
    return {
        "input_size": (config.image.channels, height, width),
        "num_classes": config.head.classes,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "tokenizer.proj",
        "classifier": "head.classifier",
        "fixed_input_size": False,
    }


def _features(depth: int) -> dict[str, Any]:
    # Four maps, evenly over the depth: what detection and segmentation heads are used to.
    blocks = dict.fromkeys(max(0, depth * i // 4 - 1) for i in range(1, 5))
    return {"out_indices": tuple(blocks), "feature_cls": "getter"}


_classifiers = models_of(ImageClassifierConfig)
default_cfgs = generate_default_cfgs({f"omnimix_{name}": _default_cfg(config) for name, config in _classifiers.items()})
for _name in _classifiers:
    globals()[f"omnimix_{_name}"] = register(_name, TimmClassifier, __name__, features=_features)
