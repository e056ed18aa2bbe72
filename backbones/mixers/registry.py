"""The registry of sequence mixers."""

from ..registry import Registry
from .base import Mixer

MIXERS: Registry[Mixer] = Registry("mixer", options="mixers")
register_mixer = MIXERS.register
