"""What stands at the entrance of a stage, where width, tokens or layout may change."""

from __future__ import annotations

from ..config import TransitionConfig
from ..context import Context, Memory
from ..layer import SequenceLayer
from ..layout import Layout
from ..registry import Registry


class Transition(SequenceLayer):
    """Tokens of one width to tokens of the stage's width; `Output.context` is that of the new tokens where they differ.

    A subclass is built as `(dim, config, site, dim_out)`. It may also read what earlier stages publish ("stages.1", a
    `Memory`), which is how long skips and U-shaped backbones are made. Where it changes the tokens, tensors in
    `Context.shared` must follow them or be left out.

    Attributes:
        primes: whether it puts tokens of its own before the first one; the initial state is then the state after these.
        shrinks: by how much the sides of a grid become shorter.
    """

    primes: bool = False
    shrinks: float = 1.0


def of_other_tokens(context: Context, layout: Layout) -> Context:
    """The context of tokens that take the place of others: what belongs to single tokens is left out."""
    shared = {name: value for name, value in context.shared.items() if isinstance(value, Memory)}
    condition = context.condition if context.condition is None or context.condition.ndim == 2 else None
    return Context(layout, condition=condition, shared=shared)


TRANSITIONS: Registry[Transition] = Registry("transition", base=TransitionConfig)
register_transition = TRANSITIONS.register
