"""What the state of `test_time` holds, and where."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_count(size: int, hidden: int | None) -> int:
    """Weights and biases of the inner model of one head."""
    return (size + 1) * size if hidden is None else (size + 1) * hidden + (hidden + 1) * size


def state_size(size: int, hidden: int | None = None, *, momentum: bool = False) -> int:
    """Numbers that the state of one head takes.

    Args:
        size: channels of the head, k.
        hidden: m, between two layers; None for the linear model.
        momentum: whether the steps have momentum.
    """
    return (3 if momentum else 2) * weight_count(size, hidden) + 1


def state_parts(state: Tensor, size: int, hidden: int | None = None, *, momentum: bool = False) -> dict[str, Tensor]:
    """The parts of a state (n, h, s), as views.

    Args:
        state: what `test_time` returned.
        size, hidden, momentum: as for `state_size`.

    Returns:
        "start": the inner weights' distance from their initial values where the mini-batch began, "now": the same
        after the last token, "momentum" where there is one, all (n, h, p): for each layer its (inputs, outputs) weight
        and then its bias. "place": tokens of the mini-batch that were read, (n, h).
    """
    count = weight_count(size, hidden)
    names = ["start", "now", *(["momentum"] if momentum else [])]
    parts = dict(zip(names, state[..., :-1].split(count, dim=-1), strict=True))
    return parts | {"place": state[..., -1]}


def flat_weights(w1: Tensor, b1: Tensor, w2: Tensor | None, b2: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The initial weights in the state's order, (h, p)."""
    layers = [(w1, b1)] if w2 is None else [(w1, b1), (w2, b2)]
    return torch.cat([part.to(dtype).flatten(1) for layer in layers for part in layer], dim=1)


def layers_of(flat: Tensor, size: int, hidden: int | None) -> list[Tensor]:
    """Each layer's weight with its bias as the last row, (..., inputs + 1, outputs), as views of (..., p)."""
    if hidden is None:
        return [flat.unflatten(-1, (size + 1, size))]
    sizes = [(size + 1) * hidden, (hidden + 1) * size]
    # Split rather than sliced: the gradient is then one concatenation.
    first, second = flat.split(sizes, dim=-1)
    return [first.unflatten(-1, (size + 1, hidden)), second.unflatten(-1, (hidden + 1, size))]
