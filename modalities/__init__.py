"""From files and raw data to tokens, and the models that begin there."""

from .corpus import Document, JsonLines, Parquet, Shards, TextFiles, standard_library
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
from .sources import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    CSVSource,
    FolderSource,
    Source,
    find_source,
    has_split,
)
from .text import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from .token_cache import TokenCache, cached_bpe, cached_tokens
from .vision import ImageClassifier, ImageClassifierConfig
from .weights import load_weights, save_weights

__all__ = [
    "AUDIO_SUFFIXES",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "BPETokenizer",
    "ByteTokenizer",
    "CSVSource",
    "Document",
    "FolderSource",
    "ImageClassifier",
    "ImageClassifierConfig",
    "JsonLines",
    "Parquet",
    "PatchTokenizer",
    "PatchTokenizerConfig",
    "Shards",
    "Source",
    "TextFiles",
    "TokenCache",
    "Tokenizer",
    "build_model",
    "cached_bpe",
    "cached_tokens",
    "create_model",
    "find_source",
    "has_split",
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
    "standard_library",
    "train_bpe",
]
