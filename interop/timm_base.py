"""timm's interface, as far as it is the same for the classifiers of every modality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from ..backbones import BackboneConfig, from_dict
from ..backbones.config import FFNConfig, MixerConfig
from ..backbones.heads import ClassificationHead
from ..backbones.heads.classification import split_tokens
from ..backbones.layout import Layout
from ..backbones.parameters import no_weight_decay
from ..errors import ConfigError, UnsupportedCall
from ..modalities import list_models, model_config
from ..modalities.common.classifier import Classifier, check_known
from ..modalities.common.grid import fit_positions
from ..modalities.common.weights import plain_names

_POOLS = {"avg": "mean", "max": "max", "token": "class_token", "": "none"}


def pool_for(name: str | None) -> str | None:
    """Our name of a pool of timm's; None stays None.

    Raises:
        ConfigError: no such pool.
    """
    if name is None:
        return None
    if name not in _POOLS:
        raise ConfigError(f"global_pool is {name!r}; it must be one of {', '.join(map(repr, _POOLS))}")
    return _POOLS[name]


def plain(value: Any) -> Any:
    """Lists as tuples: what comes from JSON has lists."""
    return tuple(value) if isinstance(value, list) else value


class TimmShort(TypedDict, total=False):
    """What differs from the named model's backbone, in timm's words where it has some; see `ShortForm`."""

    embed_dim: int
    depth: int
    drop_path_rate: float
    mixer: str
    ffn: FFNConfig | str
    mixers: dict[str, MixerConfig]
    scan: str


# Other names than timm's.
_OURS = {"embed_dim": "dim", "drop_path_rate": "drop_path"}


def whole(backbone: BackboneConfig | dict[str, Any] | None) -> BackboneConfig | None:
    """A configuration that may be what JSON has of it."""
    return from_dict(BackboneConfig, backbone) if isinstance(backbone, dict) else backbone


def chosen(cfg: str, backbone: BackboneConfig | dict[str, Any] | None, short: TimmShort, **options: Any) -> Any:
    """The configuration of a named model with those options that are not None.

    Args:
        backbone: replaces that of the named model.
        short: what differs from it.
        options: of the factory of the model.

    Raises:
        ConfigError: what is no field of `TimmShort`, all that timm's models take next to their arguments.
    """
    check_known(short, TimmShort.__annotations__)
    options |= {_OURS.get(name, name): value for name, value in short.items()} | {"backbone": whole(backbone)}
    return model_config(cfg, **{name: plain(value) for name, value in options.items() if value is not None})


class TimmModel(Classifier):
    """A classifier with timm's interface; its parameters have the same names as the plain one's.

    Derive from it and from the classifier of a modality, in this order, and call `adopt` when that one is built. Where
    timm has features as one tensor, class token and registers come first, wherever the backbone had them.
    """

    def adopt(self) -> None:
        """Set the attributes that timm reads and that follow from the parts."""
        self.num_features = self.head_hidden_size = self.embed_dim = self.backbone.stages[-1].dim
        self.num_classes = self.head.config.classes
        self.global_pool = next(name for name, pool in _POOLS.items() if pool == self.head.config.pool)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that are not on the grid."""
        return len(self.tokenizer.extra(1))

    def forward(self, x: Float[Tensor, " b *media"]) -> Float[Tensor, " b *t classes"]:
        """Logits; pooled features with `num_classes=0`; one vector a token with `global_pool=""`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, " b *media"]) -> Float[Tensor, "b t d"]:
        """Class token and registers, then the grid in raster order, after the last norm."""
        return prefix_first(*super().forward_features(x))

    def forward_head(self, x: Float[Tensor, "b t d"], pre_logits: bool = False) -> Float[Tensor, " b *t classes"]:
        """Logits from what `forward_features` returned, or with `pre_logits` what the classifier is given."""
        prefix = self.num_prefix_tokens
        layout = Layout(causal=False, grid=(1, 1, x.shape[1] - prefix), extra=tuple(range(prefix)))
        return self.head.features(x, layout) if pre_logits else self.head(x, layout)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the identity where there are no classes."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in, with another pool where given."""
        pool = pool_for(global_pool) or self.head.config.pool
        head = replace(self.head.config, classes=num_classes, pool=pool)
        # Refuses a pool that the tokenizer does not serve.
        replace(self.config, head=head)
        like = next(self.backbone.parameters())
        self.head = ClassificationHead(self.embed_dim, head).to(like.device, like.dtype).train(self.training)
        self.adopt()

    def record_size(self, img_size: tuple[int, int], **arguments: Any) -> None:
        """Tell timm of another input size and further arguments, from which it builds the model when it is exported."""
        self._traits = getattr(self, "_traits", {}) | {"img_size": img_size}
        self._model_args = getattr(self, "_model_args", {}) | {"img_size": img_size, **arguments}

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


def prefix_first(tokens: Float[Tensor, "b t d"], layout: Layout) -> Float[Tensor, "b t d"]:
    """The tokens that are not on the grid, then the grid."""
    if not layout.extra:
        return tokens
    grid, prefix = split_tokens(tokens, layout)
    return torch.cat([prefix, grid], dim=1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights that fit `model`, from a checkpoint of ours or of timm's training script, made at any size."""
    # A run's checkpoint has its configuration as "model", and weights whose names begin with "model.".
    for key in ("state_dict_ema", "state_dict", "model"):
        found = state_dict.get(key)
        if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()):
            state_dict = found
            break
    weights = plain_names({name.removeprefix("model."): value for name, value in state_dict.items()})
    return fit_positions(weights, model)


def models_of(config_class: type) -> dict[str, Any]:
    """The configurations of the named models that are of this class."""
    named = {name: model_config(name) for name in list_models()}
    return {name: config for name, config in named.items() if isinstance(config, config_class)}


def _depth(name: str, given: dict[str, Any]) -> int:
    """The number of blocks of a named model that is built with these arguments."""
    backbone = whole(given.get("backbone")) or model_config(name).backbone
    return given.get("depth") or backbone.depth


def register(
    name: str,
    model_class: type[TimmModel],
    module: str,
    *,
    features: Callable[[int], dict[str, Any]] | None = None,
    weights: Callable[[dict[str, Any], Any], dict[str, Tensor]] = checkpoint_filter_fn,
) -> Any:
    """Register a named model with timm as `omnimix_<name>`; returns the function that builds it.

    Args:
        model_class: its first argument is the name.
        module: from which it is registered, and which has its entry in `default_cfgs`.
        features: from the model's depth to timm's options of `features_only`.
        weights: from a checkpoint and a model to the weights that fit it.
    """

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if features is None and kwargs.get("features_only"):
            raise UnsupportedCall(f"omnimix_{name} makes no feature maps; take its forward_features")
        return build_model_with_cfg(
            model_class,
            build.__name__,
            pretrained,
            model_cfg=name,
            feature_cfg={} if features is None else features(_depth(name, kwargs)),
            pretrained_filter_fn=weights,
            **kwargs,
        )

    build.__name__ = build.__qualname__ = f"omnimix_{name}"
    build.__module__ = module
    build.__doc__ = f"`omnimix.create_model({name!r})` with timm's interface."
    return register_model(build)
