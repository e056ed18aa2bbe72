"""Which query sees which key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """The part of `attention`'s arguments that says what is visible."""

    causal: bool
    window: int | None
    sinks: int


def visible_keys(p: Tensor, s: Tensor, rule: Rule) -> Tensor:
    """Whether the query at position p sees the key at position s.

    Args:
        p, s: integer positions, of any shapes that broadcast; a negative s is an empty slot.

    Returns:
        Booleans of the broadcast shape.
    """
    seen = (s >= 0) & (s <= p) if rule.causal else (s >= 0).expand(torch.broadcast_shapes(p.shape, s.shape))
    if rule.window is not None:
        seen = seen & (((p - s).abs() < rule.window) | (s < rule.sinks))
    return seen


def positions(
    q_positions: Tensor | None, k_positions: Tensor | None, tq: int, tk: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The positions of the queries [b or 1, tq] and keys [b or 1, tk], with the defaults filled in."""
    if q_positions is None:
        last = torch.arange(tk - tq, tk, device=device)[None]
        q_positions = last if k_positions is None else k_positions[:, -tq:]
    return q_positions, torch.arange(tk, device=device)[None] if k_positions is None else k_positions
