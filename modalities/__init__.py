"""From files and raw data to tokens, and the models that begin there."""

from .image import PatchTokenizer, PatchTokenizerConfig, load_image
from .models import (
    build_model,
    create_model,
    list_models,
    load_model,
    model_config,
    read_details,
    register_class,
    register_model,
    save_model,
)
from .vision import ImageClassifier, ImageClassifierConfig
from .weights import load_weights, save_weights

__all__ = [
    "ImageClassifier",
    "ImageClassifierConfig",
    "PatchTokenizer",
    "PatchTokenizerConfig",
    "build_model",
    "create_model",
    "list_models",
    "load_image",
    "load_model",
    "load_weights",
    "model_config",
    "read_details",
    "register_class",
    "register_model",
    "save_model",
    "save_weights",
]
