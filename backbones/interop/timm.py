"""Every named image classifier as a timm model, `omnimix_<name>`.

Importing this module (`omnimix.timm_models`) registers them; `timm.create_model("omnimix_vig_tiny_patch16_224")` then
works as for timm's own. It stands on top of the modalities and is imported on demand only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...errors import ConfigError
from ...modalities import ImageClassifier, ImageClassifierConfig, list_models, model_config
from ...modalities.grid import fit_positions
from ...modalities.weights import plain_names
from ..heads import ClassificationHead
from ..heads.classification import split_tokens
from ..layout import Layout
from ..parameters import no_weight_decay

_POOLS = {"avg": "mean", "max": "max", "token": "class_token", "": "none"}

__all__ = ["TimmClassifier", "checkpoint_filter_fn"]


def _pool(name: str) -> str:
    if name not in _POOLS:
        raise ConfigError(f"global_pool is {name!r}; it must be one of {', '.join(map(repr, _POOLS))}")
    return _POOLS[name]


class TimmClassifier(ImageClassifier):
    """An image classifier with timm's interface; its parameters have the same names as the plain one's.

    Where timm has features as one tensor, class token and registers come first, wherever the backbone had them.
    Images of any size are served, whatever `img_size` says.

    Args:
        cfg: a name from `omnimix.list_models()`.
        img_size: the size that positions are learned for.
        global_pool: "avg", "max", "token", or "" for none; by default the named model's.
        class_token: None, "first" or "middle".
        embed_dim, depth, patch_size: by default the named model's.

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
        embed_dim: int | None = None,
        depth: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        options = {
            "classes": num_classes,
            "channels": in_chans,
            # Lists where the arguments come from JSON.
            "size": tuple(img_size) if isinstance(img_size, list) else img_size,
            "patch": tuple(patch_size) if isinstance(patch_size, list) else patch_size,
            "pool": None if global_pool is None else _pool(global_pool),
            "class_token": class_token,
            "dim": embed_dim,
            "depth": depth,
            "dropout": drop_rate,
            "drop_path": drop_path_rate,
        }
        super().__init__(model_config(cfg, **{name: value for name, value in options.items() if value is not None}))
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = self.backbone.config.dim
        self.num_prefix_tokens = len(self.tokenizer.extra(1))
        self._update()

    def _update(self) -> None:
        """Set the attributes that follow from the parts."""
        self.num_classes = self.head.config.classes
        self.global_pool = next(name for name, pool in _POOLS.items() if pool == self.head.config.pool)
        self.feature_info = [
            {"module": f"backbone.blocks.{i}", "num_chs": self.embed_dim, "reduction": max(self.tokenizer.config.patch)}
            for i in range(len(self.backbone.blocks))
        ]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *t classes"]:
        """Logits; pooled features with `num_classes=0`; one vector a token with `global_pool=""`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Class token and registers, then the grid in raster order, after the last norm."""
        return _prefix_first(*super().forward_features(x))

    def forward_head(self, x: Float[Tensor, "b t d"], pre_logits: bool = False) -> Float[Tensor, "b *t classes"]:
        """Logits from what `forward_features` returned, or with `pre_logits` what the classifier is given."""
        prefix = self.num_prefix_tokens
        layout = Layout(causal=False, grid=(1, 1, x.shape[1] - prefix), extra=tuple(range(prefix)))
        return self.head.features(x, layout) if pre_logits else self.head(x, layout)

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
        """Outputs of chosen blocks beside the features, `(features, [intermediates])`.

        Args:
            indices: the last so many blocks, those blocks, or None for all.
            return_prefix_tokens: pairs (grid, class token and registers) instead of the grid alone.
            norm: apply the last norm to each.
            stop_early: compute nothing behind the last block asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        tokens, layout = self.tokenizer(x)
        trace = self.backbone.trace(tokens, layout, taps=take, depth=last + 1 if stop_early else None)
        found: list[Any] = []
        for tap in trace.taps:
            grid, prefix = split_tokens(self.backbone.norm(tap) if norm else tap, layout)
            if output_fmt == "NCHW":
                grid = grid.mT.unflatten(-1, layout.grid[1:]).contiguous()
            found.append((grid, prefix) if return_prefix_tokens and layout.extra else grid)
        return found if intermediates_only else (_prefix_first(trace.y, layout), found)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for the given intermediates; returns their indices."""
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        self.backbone.blocks = self.backbone.blocks[: last + 1]
        self.backbone.config = replace(self.backbone.config, depth=last + 1)
        if prune_norm:
            self.backbone.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        self._update()
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the identity where there are no classes."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in, with another pool where given."""
        pool = self.head.config.pool if global_pool is None else _pool(global_pool)
        head = replace(self.head.config, classes=num_classes, pool=pool)
        ImageClassifierConfig(image=self.tokenizer.config, backbone=self.backbone.config, head=head)
        like = self.tokenizer.proj.weight
        self.head = ClassificationHead(self.embed_dim, head).to(like.device, like.dtype).train(self.training)
        self._update()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize positions and, with `patch_size`, the patch kernel."""
        self.tokenizer.resize(size=img_size, patch=patch_size)
        self._update()
        # What timm builds the model from again, when it has been exported.
        size, patch = self.tokenizer.config.size, self.tokenizer.config.patch
        self._traits = getattr(self, "_traits", {}) | {"img_size": size}
        self._model_args = getattr(self, "_model_args", {}) | {"img_size": size, "patch_size": patch}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping their insides."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return no_weight_decay(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth: tokenizer, each block, head."""
        return {
            "stem": r"^tokenizer",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r"^backbone\.norm", (99999,))],
        }


def _prefix_first(tokens: Tensor, layout: Layout) -> Tensor:
    if not layout.extra:
        return tokens
    grid, prefix = split_tokens(tokens, layout)
    return torch.cat([prefix, grid], dim=1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: TimmClassifier) -> dict[str, Tensor]:
    """Weights that fit `model`, from a checkpoint of ours or of timm's training script, made at any image size."""
    for key in ("state_dict_ema", "model", "state_dict"):
        state_dict = state_dict[key] if isinstance(state_dict.get(key), dict) else state_dict
    return fit_positions(plain_names(state_dict), model)


def _entrypoint(name: str) -> Any:
    depth = model_config(name).backbone.depth

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # Four maps, evenly over the depth: what detection and segmentation heads are used to.
        maps = {"out_indices": tuple(depth * i // 4 - 1 for i in range(1, 5)), "feature_cls": "getter"}
        return build_model_with_cfg(
            TimmClassifier,
            build.__name__,
            pretrained,
            model_cfg=name,
            feature_cfg=maps,
            pretrained_filter_fn=checkpoint_filter_fn,
            **kwargs,
        )

    build.__name__ = build.__qualname__ = f"omnimix_{name}"
    build.__doc__ = f"`omnimix.create_model({name!r})` with timm's interface."
    return build


def _default_cfg(config: ImageClassifierConfig) -> dict[str, Any]:
    return {
        "input_size": (config.image.channels, *config.image.size),
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


_named = {name: model_config(name) for name in list_models()}
_classifiers = {name: config for name, config in _named.items() if isinstance(config, ImageClassifierConfig)}
default_cfgs = generate_default_cfgs({f"omnimix_{name}": _default_cfg(config) for name, config in _classifiers.items()})
for _name in _classifiers:
    globals()[f"omnimix_{_name}"] = register_model(_entrypoint(_name))
