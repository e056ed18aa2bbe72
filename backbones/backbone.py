"""The backbone: a pattern of blocks, tiled over the depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedShape
from .block import Block
from .config import BackboneConfig
from .layout import Layout
from .norm import RMSNorm
from .parameters import initialise, remember_marks, scale_residual_outputs
from .state import State


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything that one pass through a backbone makes.

    Args:
        y: the tokens after the last norm, (b, t, d).
        state: one a block, or None where the layout is not causal.
        taps: outputs of the blocks asked for, before the last norm, (b, t, d) each.
        losses: sums over the blocks, by name.
    """

    y: Tensor
    state: tuple[State, ...] | None
    taps: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


class Backbone(nn.Module):
    """Blocks around any mixers, and a last norm; tokens in, tokens out.

    Example:
        >>> net = Backbone(BackboneConfig(dim=192, depth=12, pattern=["gla", "gla", "gla", "attention"]))
        >>> y, state = net(x, Layout(causal=True))                 # x: (b, t, 192)
        >>> z, state = net(x_next, Layout(causal=True), state)     # goes on where it stopped
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        last = max(1, config.depth - 1)
        self.blocks = nn.ModuleList(
            Block(config, config.pattern[i % len(config.pattern)], config.site(i), config.drop_path * i / last)
            for i in range(config.depth)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        initialise(self)
        scale_residual_outputs([layer for block in self.blocks for layer in block.residual_outputs()], config.depth)
        remember_marks(self)

    def forward(
        self, x: Float[Tensor, "b t d"], layout: Layout, state: tuple[State, ...] | None = None
    ) -> tuple[Float[Tensor, "b t d"], tuple[State, ...] | None]:
        """Mix the tokens; with a state, go on exactly where the call that returned it stopped.

        Raises:
            UnsupportedShape: `x` does not have this width, or does not fit the layout or the state.
            UnsupportedCall: the layout asks a mixer for what it does not declare.
        """
        trace = self.trace(x, layout, state)
        return trace.y, trace.state

    def trace(
        self,
        x: Float[Tensor, "b t d"],
        layout: Layout,
        state: tuple[State, ...] | None = None,
        *,
        taps: Sequence[int] = (),
        depth: int | None = None,
    ) -> Trace:
        """`forward` with the outputs of the blocks `taps` and the losses; stops after `depth` blocks where given."""
        if x.shape[-1] != self.config.dim:
            raise UnsupportedShape(f"x has {x.shape[-1]} channels, and the backbone {self.config.dim}")
        if x.shape[1] < 1:
            raise UnsupportedShape(f"x has no tokens, {tuple(x.shape)}")
        if state is not None and len(state) != len(self.blocks):
            raise UnsupportedShape(f"state has {len(state)} entries, and the backbone {len(self.blocks)} blocks")
        states: list[State | None] = []
        tapped: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks[:depth]):
            before = None if state is None else state[i]
            if self.checkpointing and torch.is_grad_enabled():
                x, after, extra = checkpoint(block, x, layout, before, use_reentrant=False)
            else:
                x, after, extra = block(x, layout, before)
            states.append(after)
            for name, loss in extra.items():
                losses[name] = losses[name] + loss if name in losses else loss
            if i in taps:
                tapped.append(x)
        kept = tuple(states) if layout.causal else None
        return Trace(y=self.norm(x), state=kept, taps=tapped, losses=losses)

    def init_state(self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        """The state before the first token, one a block."""
        device = torch.device(device)
        return tuple(block.mixer.init_state(batch, device=device, dtype=dtype) for block in self.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again there."""
        self.checkpointing = enable
