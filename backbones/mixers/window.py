"""Sliding-window attention with attention sinks (arXiv 2004.05150, 2309.17453)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ...errors import UnsupportedCall
from ...kernels import attention
from ..config import Site, not_negative, positive
from ..context import Context
from ..layer import Capabilities
from ..layout import Layout
from ..state import State
from .attention import Attention, AttentionConfig
from .parts.kv_cache import WindowCache
from .reference.window import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class WindowConfig(AttentionConfig):
    """Options of `window`: those of `attention`, and

    Args:
        window: tokens that a token sees, itself included; bidirectional, fewer than this many to each side.
        sinks: first tokens of the sequence that every later token sees.
    """

    window: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "window")
        not_negative(self, "sinks")


@register_mixer(
    "window",
    WindowConfig,
    summary="sliding-window attention with sinks, a constant cache",
    source="arXiv 2309.17453",
    examples=(WindowConfig(heads=4, window=4), WindowConfig(heads=4, kv_heads=2, window=3, sinks=2)),
    reference=reference,
)
class Window(Attention):
    """Attention to the last `window` tokens and the first `sinks`; the state holds just these.

    Under blocks the window counts from a block's last token, for all of its tokens.
    """

    capabilities = Capabilities()
    window: int
    cache: WindowCache

    def __init__(self, dim: int, config: WindowConfig, site: Site):
        self.window, self.sinks = config.window, config.sinks
        super().__init__(dim, config, site)
        self.capabilities = dataclasses.replace(self.capabilities, receptive_field=config.window)

    def make_cache(self, shapes: dict[str, tuple[int, int]]) -> WindowCache:
        return WindowCache(shapes, window=self.window, sinks=self.sinks)

    def check(self, x: Tensor, context: Context, state: State | None) -> None:
        super().check(x, context, state)
        layout = context.layout
        if layout.causal != "block":
            return
        longest = layout.block if isinstance(layout.block, int) else int(layout.block_boundaries(x).diff().max())
        if self.window < min(longest, x.shape[1]):
            raise UnsupportedCall(
                f"the window of {self.window} tokens does not hold a block of {longest}, and its tokens would not see "
                f"themselves; configure window={longest} or more"
            )

    def attend_cached(
        self, q: Tensor, rows: dict[str, Tensor], layout: Layout, state: State | None
    ) -> tuple[Tensor, State]:
        if self.sinks or not self.cache.slots or state is None or layout.cu_seqlens is not None or q.shape[1] > 1:
            return super().attend_cached(q, rows, layout, state)
        queries = state["count"][:, None]
        grown, kept = self.cache.rolled(rows, queries, state)
        o = attention(q, grown["k"], grown["v"], window=self.window, q_positions=queries, k_positions=grown["ranks"])
        return o, kept
