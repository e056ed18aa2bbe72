"""One backbone, any sequence mixer."""

from .backbone import Backbone
from .config import (
    BackboneConfig,
    BlockConfig,
    FFNConfig,
    MixerConfig,
    ObjectiveConfig,
    ResidualConfig,
    StageConfig,
    TransitionConfig,
)
from .context import Context, Memory
from .ffn import list_ffns
from .language import LanguageModel, LanguageModelConfig
from .layer import Capabilities, Output, SequenceLayer
from .layout import Layout
from .mixers import list_mixers
from .parameters import no_weight_decay
from .residual import list_residuals
from .serialization import from_dict, to_dict
from .state import State
from .transition import list_transitions
from .wrappers import list_wrappers

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BlockConfig",
    "Capabilities",
    "Context",
    "FFNConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Layout",
    "Memory",
    "MixerConfig",
    "ObjectiveConfig",
    "Output",
    "ResidualConfig",
    "SequenceLayer",
    "StageConfig",
    "State",
    "TransitionConfig",
    "from_dict",
    "list_ffns",
    "list_mixers",
    "list_residuals",
    "list_transitions",
    "list_wrappers",
    "no_weight_decay",
    "to_dict",
]
