"""Sliding-window attention with attention sinks (arXiv 2004.05150, 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedCall
from ...kernels import attention
from ..config import Site, positive
from ..layout import Layout
from ..state import State
from .attention import Attention, AttentionConfig
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class WindowConfig(AttentionConfig):
    """Options of `window`: those of `attention`, and

    Args:
        window: tokens that a token sees, itself included; both ways, fewer than this many to each side.
        sinks: first tokens of the sequence that every later token sees.
    """

    window: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "window")


@register_mixer(
    "window",
    WindowConfig,
    summary="sliding-window attention with sinks, a constant cache",
    source="arXiv 2309.17453",
    examples=(WindowConfig(heads=4, window=4), WindowConfig(heads=4, kv_heads=2, window=3, sinks=2)),
)
class Window(Attention):
    """Attention to the last `window` tokens and the first `sinks`; the state holds just these.

    Under blocks the window counts from a block's last token, for all of its tokens.
    """

    constant_state = True

    def __init__(self, dim: int, config: WindowConfig, site: Site):
        super().__init__(dim, config, site)
        self.window, self.sinks = config.window, config.sinks
        self.slots = config.window - 1 + config.sinks

    def _check(self, x: Tensor, layout: Layout, state: State | None) -> None:
        super()._check(x, layout, state)
        if layout.causal == "block" and self.window < min(layout.block, x.shape[1]):
            raise UnsupportedCall(
                f"the window of {self.window} tokens does not hold a block of {layout.block}, and its tokens would not "
                f"see themselves; configure window={layout.block} or more"
            )

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, layout: Layout, state: State | None
    ) -> tuple[Tensor, State]:
        if self.sinks or not self.slots or state is None or layout.cu_seqlens is not None or q.shape[1] > 1:
            return super()._go_on(q, k, v, places, layout, state)
        # One token takes the place of the oldest, or of an empty slot: `_keep` puts both last.
        news = {"k": k, "v": v, "slots": places}
        k, v, slots = (torch.cat([new, state[name]], dim=1) for name, new in news.items())
        o = attention(q, k, v, window=self.window, q_positions=places, k_positions=slots)
        return o, State({"k": k[:, :-1], "v": v[:, :-1], "slots": slots[:, :-1], "position": state["position"] + 1})

    def _keep(self, k: Tensor, v: Tensor, slots: Tensor, position: Tensor) -> State:
        missing = max(0, self.slots - slots.shape[1])
        k, v, slots = (
            F.pad(k, (0, 0, 0, 0, missing, 0)),
            F.pad(v, (0, 0, 0, 0, missing, 0)),
            F.pad(slots, (missing, 0), value=-1),
        )
        needed = (slots > position[:, None] - self.window) | (slots < self.sinks)
        slots, index = torch.where(needed, slots, -1).topk(self.slots, dim=1)
        index = index[:, :, None, None].expand(-1, -1, *k.shape[2:])
        empty = (slots < 0)[:, :, None, None]
        k, v = (s.gather(1, index).masked_fill(empty, 0) for s in (k, v))
        return super()._keep(k, v, slots, position)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return self._empty(batch, self.slots, device=device, dtype=dtype)
