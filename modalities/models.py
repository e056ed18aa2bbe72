"""Named models, and models as folders."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..backbones import LanguageModel
from ..errors import CheckpointError, ConfigError, UnknownName
from .audio.model import AUDIO_MODELS, AudioClassifier, audio_classifier
from .common.classifier import SHORT
from .common.weights import (
    CONFIG,
    WEIGHTS,
    build_config,
    check_fits,
    load_weights,
    read_config,
    save_weights,
    stored_shapes,
    unwrap,
    write_config,
)
from .image.model import VISION_MODELS, ImageClassifier, image_classifier
from .video.model import VIDEO_MODELS, VideoClassifier, video_classifier

_factories: dict[str, Callable[..., Any]] = {}
_classes: dict[str, type[Any]] = {}


def register_model(name: str, factory: Callable[..., Any]) -> None:
    """Give a configuration a name.

    Args:
        name: what users write.
        factory: returns the configuration of a registered class; its keyword arguments, none of them required, are
            what `create_model` lets users override.

    Raises:
        ValueError: the name is taken.
    """
    if name in _factories:
        raise ValueError(f"a model called {name!r} is registered already")
    _factories[name] = factory


def register_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """Make a class of models known to `create_model`, `save_model` and `load_model`.

    The class is built from one configuration, of its attribute `config_class`, and an instance has it as `config`.
    """
    _classes[model_class.__name__] = model_class
    return model_class


def list_classes() -> list[type[nn.Module]]:
    """All registered classes of models."""
    return list(_classes.values())


def list_models(filter: str = "*") -> list[str]:
    """Names of all registered models, or of those that match a pattern.

    Args:
        filter: as the shell's, "vi*"; capital letters are others than small ones.
    """
    return sorted(name for name in _factories if fnmatchcase(name, filter))


def model_config(name: str, **overrides: Any) -> Any:
    """The configuration of a named model.

    Args:
        overrides: what to change: `backbone`, the whole configuration, or its short form (mixer, dim, depth, ffn,
            mixers, scan, drop_path); and the other options of `image_classifier`, `video_classifier` or
            `audio_classifier`.

    Raises:
        UnknownName: no such model.
        ConfigError: an override that this model does not have, or values that cannot work.
    """
    if name not in _factories:
        raise UnknownName("model", name, _factories)
    factory = _factories[name]
    if overrides.get("backbone") is not None and isinstance(factory, partial):
        # A whole backbone replaces the named model's, of which it takes nothing.
        kept = {option: value for option, value in factory.keywords.items() if option not in SHORT}
        factory = partial(factory.func, **kept)
    return factory(**overrides)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A named model with new weights; see `model_config` for the overrides and errors."""
    return build_model(model_config(name, **overrides))


def build_model(config: Any) -> nn.Module:
    """The model that a configuration describes.

    Raises:
        ConfigError: no registered class is built from such a configuration.
    """
    for model_class in _classes.values():
        if model_class.config_class is type(config):
            return model_class(config)
    kinds = ", ".join(c.config_class.__name__ for c in _classes.values())
    raise ConfigError(f"config is a {type(config).__name__}; models are built from: {kinds}")


def save_model(model: nn.Module, folder: str | Path, *, details: dict[str, Any] | None = None) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all.

    Args:
        model: of a registered class, or wrapped by torch.compile or data parallelism.
        details: anything that goes into JSON and that whoever uses the model needs, such as the names of the classes;
            `read_details` returns it.

    Raises:
        ConfigError: a model of no registered class.
    """
    inner = unwrap(model)
    kind = next((name for name, c in _classes.items() if isinstance(inner, c)), None)
    if kind is None:
        raise ConfigError(f"model is a {type(inner).__name__}; it must be one of: {', '.join(_classes)}")
    save_weights(inner, Path(folder) / WEIGHTS)
    write_config(inner.config, kind, Path(folder) / CONFIG, details)


def load_model(folder: str | Path, *, size: int | tuple[int, ...] | None = None) -> nn.Module:
    """The model that `save_model` wrote, in evaluation mode. No code in the files is run.

    Args:
        size: of images (h, w) or videos (t, h, w), other than the one that the model was saved with; its positions are
            resized.

    Raises:
        ConfigError: a size for a model that has none.
        CheckpointError: a file is missing or corrupt, or the two do not fit each other; nothing is loaded.
    """
    file = Path(folder) / CONFIG
    content = read_config(file)
    if content["model"] not in _classes:
        raise CheckpointError(f"{file}: {UnknownName('class of models', content['model'], _classes)}")
    config = build_config(_classes[content["model"]].config_class, content["config"], file)
    weights = Path(folder) / WEIGHTS
    backbone = getattr(config, "backbone", None)
    check_fits(partial(build_model, config), stored_shapes(weights), weights, backbone=backbone)
    if size is not None:
        if not hasattr(config, "resized"):
            raise ConfigError(f"size is {size}, but a {content['model']} has none; leave it out")
        config = config.resized(size)
    model = build_model(config)
    load_weights(model, weights, resize=size is not None)
    return model.eval()


def read_details(folder: str | Path) -> dict[str, Any]:
    """The `details` that `save_model` was given.

    Raises:
        CheckpointError: the folder has no readable `config.json`.
    """
    return read_config(Path(folder) / CONFIG)["details"]


register_class(ImageClassifier)
register_class(AudioClassifier)
register_class(VideoClassifier)
register_class(LanguageModel)
for _name, _options in VISION_MODELS.items():
    register_model(_name, partial(image_classifier, **_options))
for _name, _options in VIDEO_MODELS.items():
    register_model(_name, partial(video_classifier, **_options))
for _name, _options in AUDIO_MODELS.items():
    register_model(_name, partial(audio_classifier, **_options))
