"""What is asked of a backbone's tokens: labels."""

from .classification import ClassificationHead, ClassificationHeadConfig

__all__ = ["ClassificationHead", "ClassificationHeadConfig"]
