"""RWKV's channel mixing: a feed-forward layer that also sees the token before (arXiv 2404.05892, 2503.14456)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import FFNConfig, Site, positive
from ..context import Context
from ..layer import Capabilities, Output
from ..mixers.parts.token_shift import token_shift
from ..parameters import mark
from ..state import State
from .base import FFN, register_ffn


@dataclass(frozen=True, kw_only=True)
class RWKVConfig(FFNConfig):
    """Options of `rwkv`.

    Args:
        ratio: hidden channels per channel.
    """

    ratio: float = 4.0

    def __post_init__(self) -> None:
        positive(self, "ratio")


@register_ffn(
    "rwkv",
    RWKVConfig,
    summary="two linear layers around a squared ReLU, of each token mixed with the one before",
    source="arXiv 2503.14456",
    examples=(RWKVConfig(ratio=2.0),),
)
class RWKVChannelMixing(FFN):
    """W₂ relu(W₁ (x_t + μ ⊙ (x_{t-1} − x_t)))² (RWKV-7, section 4). Its state is the last token."""

    capabilities = Capabilities(receptive_field=2)

    def __init__(self, dim: int, config: RWKVConfig, site: Site):
        super().__init__()
        place, rest = torch.arange(dim) / dim, 1 - site.layer / site.depth
        self.shift = nn.Parameter(1 - place ** (rest**4))
        mark(self, "shift", decay=False)
        self.dim, hidden = dim, max(1, round(dim * config.ratio))
        self.in_proj = nn.Linear(dim, hidden, bias=False)
        self.out_proj = nn.Linear(hidden, dim, bias=False)
        # As in BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.
        nn.init.uniform_(self.in_proj.weight, -0.5 * dim**-0.5, 0.5 * dim**-0.5)
        nn.init.zeros_(self.out_proj.weight)
        for layer in (self.in_proj, self.out_proj):
            mark(layer, "weight", initialised=True)

    def forward(self, x: Float[Tensor, "b t d"], context: Context, state: State | None = None) -> Output:
        layout = Context.of(context).layout
        last = None if state is None else state["last"]
        before, last = token_shift(x, last, layout.cu_seqlens)
        hidden = self.in_proj(torch.addcmul(x, before - x, self.shift.to(x.dtype)))
        y = self.out_proj(F.relu(hidden).square())
        return Output(y, State({"last": last}) if layout.causal else None)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return State({"last": torch.zeros(batch, self.dim, 1, device=device, dtype=dtype)})
