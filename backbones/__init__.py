"""One backbone, any sequence mixer."""

from .backbone import Backbone, Trace
from .channel import list_channels
from .config import BackboneConfig, ChannelConfig, MixerConfig, ObjectiveConfig, from_dict, to_dict
from .language import LanguageModel, LanguageModelConfig
from .layout import Layout
from .mixers import list_mixers
from .parameters import no_weight_decay
from .state import State

__all__ = [
    "Backbone",
    "BackboneConfig",
    "ChannelConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Layout",
    "MixerConfig",
    "ObjectiveConfig",
    "State",
    "Trace",
    "from_dict",
    "list_channels",
    "list_mixers",
    "no_weight_decay",
    "to_dict",
]
