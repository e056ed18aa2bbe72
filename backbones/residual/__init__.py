"""Residual forms: what is added to what, around each layer of a block."""

from __future__ import annotations

from . import adaln, hyper, norms  # noqa: F401
from .base import RESIDUALS, Residual


def list_residuals() -> list[str]:
    """Names of all registered residual forms."""
    return RESIDUALS.names()


__all__ = ["RESIDUALS", "Residual", "list_residuals"]
