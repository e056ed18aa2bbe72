"""omnimix: any modality, any efficient sequence mixer, one backbone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that defines it. Nothing is imported before it is asked for, so that `import omnimix` and
# `omnimix --help` cost nothing.
_LAZY = {
    "__version__": ".utils.version",
    "Backbone": ".backbones",
    "BackboneConfig": ".backbones",
    "BlockConfig": ".backbones",
    "Context": ".backbones",
    "Memory": ".backbones",
    "StageConfig": ".backbones",
    "Layout": ".backbones",
    "State": ".backbones",
    "LanguageModel": ".backbones",
    "LanguageModelConfig": ".backbones",
    "DiffusionConfig": ".backbones.decoding",
    "GenerationConfig": ".backbones.decoding",
    "convert": ".backbones.convert",
    "diffuse": ".backbones.decoding",
    "generate": ".backbones.decoding",
    "TextGenerator": ".modalities.text.text_generator",
    "list_mixers": ".backbones",
    "list_models": ".modalities",
    "fit": ".recipes.api",
    "Run": ".recipes.api",
    "load": ".recipes.predictor",
    "export": ".recipes.export",
    "save_model": ".modalities",
    "load_model": ".modalities",
    "Prediction": ".recipes.predictor",
    "ImagePreprocess": ".recipes.vision.preprocess",
    "VideoPreprocess": ".recipes.video.preprocess",
    "AudioPreprocess": ".recipes.audio.preprocess",
    "Predictor": ".recipes.predictor",
    "create_model": ".modalities",
    "ImageClassifier": ".modalities",
    "ImageClassifierConfig": ".modalities",
    "PatchTokenizer": ".modalities",
    "PatchTokenizerConfig": ".modalities",
    "TubeletTokenizer": ".modalities",
    "TubeletTokenizerConfig": ".modalities",
    "VideoClassifier": ".modalities",
    "VideoClassifierConfig": ".modalities",
    "AudioTokenizer": ".modalities",
    "AudioTokenizerConfig": ".modalities",
    "AudioClassifier": ".modalities",
    "AudioClassifierConfig": ".modalities",
    "VideoReader": ".modalities",
    "read_audio": ".modalities",
    "read_clip": ".modalities",
    "ByteTokenizer": ".modalities",
    "load_tokenizer": ".modalities",
    "train_bpe": ".modalities",
    "ClassificationHead": ".backbones.heads",
    "list_objectives": ".backbones.heads",
}
_MODULES = {
    "backbones": ".backbones",
    "errors": ".errors",
    "kernels": ".kernels",
    "modalities": ".modalities",
    "timm_models": ".interop.timm",
}
# These need an extra; they are left out of __all__, so that `from omnimix import *` works without.
_EXTRAS = {"huggingface": ".interop.huggingface"}

__all__ = [*_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _EXTRAS:
        return import_module((_MODULES | _EXTRAS)[name], __name__)
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXTRAS})
