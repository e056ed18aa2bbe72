"""Test-time training: TTT-Linear and TTT-MLP (arXiv 2407.04620), with Titans' gates (arXiv 2501.00663) by option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import test_time
from ...kernels.test_time import state_size
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from ..parameters import mark
from ..rotary import rotary
from ..state import State
from .base import ScanMixer, heads_for
from .parts.log_sigmoid import log_sigmoid
from .reference.ttt import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class TTTConfig(MixerConfig):
    """Options of `ttt`.

    Args:
        heads: 64 channels each by default.
        model: what each head trains, one linear layer or an MLP of two.
        hidden_ratio: hidden channels of the MLP per channel of the head.
        chunk: tokens in a mini-batch of the inner training.
        base_lr: largest inner learning rate; 1 for the linear model and 0.1 for the MLP by default, as published.
        rotary: whether q and k are turned by their place in the mini-batch.
        momentum: whether inner steps have momentum, a gate of the token (Titans).
        forget: whether inner weights decay by a gate of the token (Titans).
    """

    heads: int | None = None
    model: Literal["linear", "mlp"] = "linear"
    hidden_ratio: int = 4
    chunk: int = 16
    base_lr: float | None = None
    rotary: bool = True
    momentum: bool = False
    forget: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "hidden_ratio", "chunk", "base_lr")


class _Direction(nn.Module):
    """What each direction owns: the inner model's first weights and norm, and the gates of its training."""

    def __init__(self, dim: int, heads: int, config: TTTConfig, eps: float):
        super().__init__()
        size, self.config, self.eps = dim // heads, config, eps
        self.hidden = size * config.hidden_ratio if config.model == "mlp" else None
        self.base_lr = config.base_lr or (1.0 if self.hidden is None else 0.1)
        first = self.hidden or size
        self.w1 = nn.Parameter(torch.randn(heads, size, first) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(heads, first))
        self.w2 = self.b2 = None
        if self.hidden is not None:
            self.w2 = nn.Parameter(torch.randn(heads, first, size) * 0.02)
            self.b2 = nn.Parameter(torch.zeros(heads, size))
            mark(self, "b2", decay=False)
        self.norm_weight = nn.Parameter(torch.ones(heads, size))
        mark(self, "b1", "norm_weight", "norm_bias", decay=False)
        self.norm_bias = nn.Parameter(torch.zeros(heads, size))
        self.gates = nn.Linear(dim, heads * (1 + config.momentum + config.forget))
        self.heads, self.state_shape = heads, (heads, state_size(size, self.hidden, momentum=config.momentum))

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        layout = context.layout
        x, *qkv = streams
        q, k, v = (s.unflatten(-1, (self.heads, -1)) for s in qkv)
        if self.config.rotary:
            start = None if state is None else state["memory"].detach()[:, 0, -1].round().long()
            place = layout.positions(x, start) % self.config.chunk
            q, k = rotary(q, place), rotary(k, place)
        gates = self.gates(x)
        gates = list(gates.to(torch.promote_types(x.dtype, torch.float32)).split(self.heads, dim=-1))
        o, memory = test_time(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            self.base_lr * gates.pop(0).sigmoid(),
            self.w1,
            self.b1,
            self.norm_weight,
            self.norm_bias,
            w2=self.w2,
            b2=self.b2,
            momentum=gates.pop(0).sigmoid() if self.config.momentum else None,
            # As slow to forget at the start as GLA's gates.
            decay=log_sigmoid(gates.pop(0)) / 16 if self.config.forget else None,
            chunk=self.config.chunk,
            eps=self.eps,
            initial_state=None if state is None else state["memory"],
            cu_seqlens=layout.cu_seqlens,
        )
        return o.flatten(-2), State({"memory": memory})


@register_mixer(
    "ttt",
    TTTConfig,
    summary="an inner model trained on every mini-batch of tokens; its weights are the state",
    source="arXiv 2407.04620",
    examples=(
        TTTConfig(heads=2, chunk=4),
        TTTConfig(heads=4, model="mlp", hidden_ratio=1, chunk=7, momentum=True, forget=True, rotary=False),
    ),
    reference=reference,
)
class TTT(ScanMixer):
    """W_t = W° − Σ η_i ∇ℓ(W°; k_i, v_i) over the mini-batch so far, o_t = f(q_t; W_t); normalised, with a swish gate.

    q and k have unit length, and so the inner steps, which the authors divide by the head's size, are stable.
    """

    def __init__(self, dim: int, config: TTTConfig, site: Site):
        super().__init__(site)
        heads = heads_for(dim, config.heads)
        self.in_proj = nn.Linear(dim, 4 * dim, bias=False)
        directions = [_Direction(dim, heads, config, site.norm_eps) for _ in site.scan]
        self.branches, self.state_shape = nn.ModuleList(directions), directions[0].state_shape
        self.norm = RMSNorm(dim, eps=site.norm_eps, groups=heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        *qkv, gate = self.in_proj(x).chunk(4, dim=-1)
        return (x, *qkv), gate

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State({"memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide)})
