"""From files and raw data to tokens, and the models that begin there."""

from .image import PatchTokenizer, PatchTokenizerConfig, load_image

__all__ = ["PatchTokenizer", "PatchTokenizerConfig", "load_image"]
