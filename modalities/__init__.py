"""From files and raw data to tokens, and the models that begin there."""

from .audio.fronts import FrameFrontConfig, FrontConfig, PatchFrontConfig, WaveFrontConfig, list_fronts
from .audio.mel import LogMel, MelConfig, SpecAugment, SpecAugmentConfig
from .audio.model import AudioClassifier, AudioClassifierConfig, audio_classifier
from .audio.tokenizer import AudioTokenizer, AudioTokenizerConfig
from .common.encode import write_audio, write_video
from .common.weights import load_weights, save_weights
from .data.corpus import Document, JsonLines, Parquet, Shards, TextFiles, standard_library
from .data.shards import ShardSource
from .data.sources import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, FolderSource, Source, find_source, has_split
from .data.tables import CSVSource
from .data.tar import TarIndex
from .data.token_cache import TokenCache, cached_bpe, cached_tokens
from .image.files import load_image
from .image.model import ImageClassifier, ImageClassifierConfig
from .image.tokenizer import PatchTokenizer, PatchTokenizerConfig
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
from .text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from .video.files import Clip, VideoInfo, VideoReader, read_audio, read_clip
from .video.model import VideoClassifier, VideoClassifierConfig, VideoState, VideoStep, video_classifier
from .video.sampling import Dense, Sampling, Segments, Uniform, views
from .video.tokenizer import TubeletTokenizer, TubeletTokenizerConfig, inflate

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
