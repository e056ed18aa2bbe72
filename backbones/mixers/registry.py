"""The registries of sequence mixers."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MixerConfig
from ..registry import Registry
from .base import Mixer

MIXERS: Registry[Mixer] = Registry("mixer", base=MixerConfig, options="mixers")
register_mixer = MIXERS.register


@dataclass(frozen=True, kw_only=True)
class CrossMixerConfig(MixerConfig):
    """Base of the options of mixers that need more than the tokens: a `Memory` that somebody else provides."""


CROSS_MIXERS: Registry[Mixer] = Registry("mixer of given tokens", base=CrossMixerConfig)
register_cross_mixer = CROSS_MIXERS.register
