"""Transitions between stages, by name."""

from __future__ import annotations

from . import kv, merge, meta, skip  # noqa: F401
from .base import TRANSITIONS, Transition


def list_transitions() -> list[str]:
    """Names of all registered transitions."""
    return TRANSITIONS.names()


__all__ = ["TRANSITIONS", "Transition", "list_transitions"]
