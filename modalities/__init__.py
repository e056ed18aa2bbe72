"""From files and raw data to tokens, and the models that begin there."""

from .audio import AudioTokenizer, AudioTokenizerConfig
from .audio_models import AudioClassifier, AudioClassifierConfig, audio_classifier
from .corpus import Document, JsonLines, Parquet, Shards, TextFiles, standard_library
from .decode import Clip, VideoInfo, VideoReader, read_audio, read_clip
from .encode import write_audio, write_video
from .fronts import FrameFrontConfig, FrontConfig, PatchFrontConfig, WaveFrontConfig, list_fronts
from .image import PatchTokenizer, PatchTokenizerConfig, load_image
from .mel import LogMel, MelConfig, SpecAugment, SpecAugmentConfig
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
from .sampling import Dense, Sampling, Segments, Uniform, views
from .shards import ShardSource
from .sources import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    FolderSource,
    Source,
    find_source,
    has_split,
)
from .tables import CSVSource
from .tar import TarIndex
from .text import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from .token_cache import TokenCache, cached_bpe, cached_tokens
from .video import TubeletTokenizer, TubeletTokenizerConfig, inflate
from .video_models import VideoClassifier, VideoClassifierConfig, VideoState, VideoStep, video_classifier
from .vision import ImageClassifier, ImageClassifierConfig
from .weights import load_weights, save_weights

__all__ = [
    "AUDIO_SUFFIXES",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "AudioClassifier",
    "AudioClassifierConfig",
    "AudioTokenizer",
    "AudioTokenizerConfig",
    "BPETokenizer",
    "ByteTokenizer",
    "CSVSource",
    "Clip",
    "Dense",
    "Document",
    "FolderSource",
    "FrameFrontConfig",
    "FrontConfig",
    "ImageClassifier",
    "ImageClassifierConfig",
    "JsonLines",
    "LogMel",
    "MelConfig",
    "Parquet",
    "PatchFrontConfig",
    "PatchTokenizer",
    "PatchTokenizerConfig",
    "Sampling",
    "Segments",
    "ShardSource",
    "Shards",
    "Source",
    "SpecAugment",
    "SpecAugmentConfig",
    "TarIndex",
    "TextFiles",
    "TokenCache",
    "Tokenizer",
    "TubeletTokenizer",
    "TubeletTokenizerConfig",
    "Uniform",
    "VideoClassifier",
    "VideoClassifierConfig",
    "VideoInfo",
    "VideoReader",
    "VideoState",
    "VideoStep",
    "WaveFrontConfig",
    "audio_classifier",
    "build_model",
    "cached_bpe",
    "cached_tokens",
    "create_model",
    "find_source",
    "has_split",
    "inflate",
    "list_fronts",
    "list_models",
    "load_image",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "model_config",
    "read_audio",
    "read_clip",
    "read_details",
    "register_class",
    "register_model",
    "save_model",
    "save_weights",
    "standard_library",
    "train_bpe",
    "video_classifier",
    "views",
    "write_audio",
    "write_video",
]
