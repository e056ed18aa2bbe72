"""What is asked of a backbone's tokens: labels, or more tokens.

A new objective of language models is a file here, its registration, and a line in the import below.
"""

from __future__ import annotations

from . import block, causal, masked, sedd  # noqa: F401
from .classification import ClassificationHead, ClassificationHeadConfig
from .objective import Likelihood, Objective, ObjectiveLoss, get_objective, list_objectives

__all__ = [
    "ClassificationHead",
    "ClassificationHeadConfig",
    "Likelihood",
    "Objective",
    "ObjectiveLoss",
    "get_objective",
    "list_objectives",
]
