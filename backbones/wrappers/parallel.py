"""Mixers side by side on the same tokens (Hymba, arXiv 2411.13676)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Site
from ..layout import Layout
from ..mixers.base import Mixer
from ..norm import RMSNorm
from ..state import State


class Parallel(Mixer):
    """The mean of several mixers' outputs, each normalised and scaled by channel, as Hymba fuses its heads.

    It can do what all its parts can.
    """

    def __init__(self, parts: dict[str, Mixer], dim: int, site: Site):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.norms = nn.ModuleDict({name: RMSNorm(dim, eps=site.norm_eps) for name in parts})
        for capability in ("causal", "bidirectional", "blockwise", "packed", "streaming", "constant_state"):
            setattr(self, capability, all(getattr(part, capability) for part in parts.values()))

    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        total, states = None, {}
        for name, part in self.parts.items():
            y, states[name] = part(x, layout, None if state is None else state[name])
            y = self.norms[name](y)
            total = y if total is None else total + y
        return total / len(self.parts), State(states) if layout.causal else None

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return State({name: part.init_state(batch, device=device, dtype=dtype) for name, part in self.parts.items()})

    def residual_outputs(self) -> list[nn.Linear]:
        # The norms behind the parts set the scale of what is written.
        return []
