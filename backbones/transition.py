"""What stands at the entrance of a stage, where width, tokens or layout may change."""

from __future__ import annotations

from .config import TransitionConfig
from .layer import SequenceLayer
from .registry import Registry


class Transition(SequenceLayer):
    """Tokens of width `dim` to tokens of the stage's width; `Output.context` is that of the new tokens.

    A subclass is built as `(dim, config, site, dim_out)`. A stage's transition may also read what other stages publish
    ("stages.1"), which is how long skips and U-shaped backbones are made.
    """

    dim_out: int


TRANSITIONS: Registry[Transition] = Registry("transition", base=TransitionConfig)
register_transition = TRANSITIONS.register


def list_transitions() -> list[str]:
    """Names of all registered transitions."""
    return TRANSITIONS.names()
