"""Layers around layers, which stand in a pattern where a mixer may."""

from __future__ import annotations

from . import add_before, fold, low_rank, mixture_of_depths, parallel  # noqa: F401
from .base import WRAPPERS


def list_wrappers() -> list[str]:
    """Names of all registered wrappers."""
    return WRAPPERS.names()


__all__ = ["WRAPPERS", "list_wrappers"]
