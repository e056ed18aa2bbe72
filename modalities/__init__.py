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
from .text import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from .vision import ImageClassifier, ImageClassifierConfig
from .weights import load_weights, save_weights

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "ImageClassifier",
    "ImageClassifierConfig",
    "PatchTokenizer",
    "PatchTokenizerConfig",
    "Tokenizer",
    "build_model",
    "create_model",
    "list_models",
    "load_image",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "model_config",
    "read_details",
    "register_class",
    "register_model",
    "save_model",
    "save_weights",
    "train_bpe",
]
