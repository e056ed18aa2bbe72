"""The registry of sequence mixers."""

from ..config import MixerConfig
from ..registry import Registry
from .base import Mixer

MIXERS: Registry[Mixer] = Registry("mixer", base=MixerConfig, options="mixers")
register_mixer = MIXERS.register
