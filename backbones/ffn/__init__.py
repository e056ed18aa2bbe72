"""The feed-forward layers of blocks, one file each."""

from __future__ import annotations

from . import mlp, rwkv  # noqa: F401
from .base import FFN, FFNS
from .moe import expert_loads, rebalance

get_ffn = FFNS.get


def list_ffns() -> list[str]:
    """Names of all registered feed-forward layers."""
    return FFNS.names()


__all__ = ["FFN", "FFNS", "expert_loads", "get_ffn", "list_ffns", "rebalance"]
