"""The registry of layers around layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MixerConfig
from ..layer import SequenceLayer
from ..registry import Registry


@dataclass(frozen=True, kw_only=True)
class WrapperConfig(MixerConfig):
    """Base of the options of wrappers, which stand where a mixer may."""


WRAPPERS: Registry[SequenceLayer] = Registry("wrapper", base=WrapperConfig)
register_wrapper = WRAPPERS.register
