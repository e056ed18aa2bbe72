"""The channel layers, the other half of a block, one file each."""

from __future__ import annotations

from . import mlp  # noqa: F401
from .base import CHANNELS, Channel
from .moe import expert_loads, rebalance

get_channel = CHANNELS.get


def list_channels() -> list[str]:
    """Names of all registered channel layers."""
    return CHANNELS.names()


__all__ = ["CHANNELS", "Channel", "expert_loads", "get_channel", "list_channels", "rebalance"]
