"""The sequence mixers, one file each: projections around one kernel.

A new mixer is a file here, its registration, and a line in the import below; see CONTRIBUTING.md.
"""

from __future__ import annotations

from ..config import Site
from ..registry import Entry
from . import (  # noqa: F401
    attention,
    cross_attention,
    deltanet,
    gated_deltanet,
    gla,
    hyena,
    kda,
    linear,
    mamba,
    mamba2,
    moba,
    nsa,
    retention,
    rglru,
    rwkv7,
    s4d,
    ttt,
    window,
)
from .base import Mixer
from .registry import MIXERS

get_mixer = MIXERS.get


def list_mixers() -> list[str]:
    """Names of all registered mixers."""
    return MIXERS.names()


__all__ = ["MIXERS", "Entry", "Mixer", "Site", "get_mixer", "list_mixers"]
