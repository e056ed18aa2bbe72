"""Gated linear attention (arXiv 2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import gated_linear
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from ..state import State
from .base import ScanMixer, heads_for
from .parts.log_sigmoid import log_sigmoid
from .reference.gla import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    """Options of `gla`.

    Args:
        heads: 64 value channels each by default.
        key_ratio: key channels per channel of the model.
        gate_rank: rank of the projection that makes the gates.
        gate_temperature: the gate is σ(·)^(1 / temperature); larger forgets more slowly.
    """

    heads: int | None = None
    key_ratio: float = 0.5
    gate_rank: int = 16
    gate_temperature: float = 16.0

    def __post_init__(self) -> None:
        positive(self, "heads", "key_ratio", "gate_rank", "gate_temperature")


class _Direction(nn.Module):
    """What each direction owns: its gates."""

    def __init__(self, dim: int, heads: int, key_dim: int, config: GLAConfig):
        super().__init__()
        self.heads, self.temperature = heads, config.gate_temperature
        self.gate_down = nn.Linear(dim, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, key_dim)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        x, q, k, v = streams
        decay = log_sigmoid(self.gate_up(self.gate_down(x))) / self.temperature
        o, memory = gated_linear(
            q.unflatten(-1, (self.heads, -1)),
            k.unflatten(-1, (self.heads, -1)),
            v.unflatten(-1, (self.heads, -1)),
            decay.unflatten(-1, (self.heads, -1)),
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        return o.flatten(-2), State({"memory": memory})


@register_mixer(
    "gla",
    GLAConfig,
    summary="linear attention with a gate per channel",
    source="arXiv 2312.06635",
    examples=(GLAConfig(heads=2),),
    reference=reference,
)
class GLA(ScanMixer):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ with α_t = σ(W x_t)^(1/16); normalised by head, with a swish output gate.

    Multi-directional scans: ViG (arXiv 2405.18425), which shares q, k, v and the output and gives each its gates.
    """

    def __init__(self, dim: int, config: GLAConfig, site: Site):
        super().__init__(site)
        heads = heads_for(dim, config.heads)
        key_dim = max(1, round(dim * config.key_ratio / heads)) * heads
        self.sizes = (key_dim, key_dim, dim, dim)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.branches = nn.ModuleList(_Direction(dim, heads, key_dim, config) for _ in site.scan)
        self.norm = RMSNorm(dim, eps=site.norm_eps, groups=heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.state_shape = (heads, key_dim // heads, dim // heads)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        q, k, v, gate = self.in_proj(x).split(self.sizes, dim=-1)
        return (x, q, k, v), gate

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State({"memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide)})
