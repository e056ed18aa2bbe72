"""Mamba-2, state space duality (arXiv 2405.21060)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import gated_linear, mamba2_step, short_conv
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..norm import RMSNorm
from ..parameters import mark
from ..state import State
from .base import ScanMixer, heads_for
from .reference.mamba2 import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Options of `mamba2`.

    Args:
        heads: 64 channels each by default.
        expand: inner channels per channel of the model.
        state_size: N, the size of the state per channel.
        groups: of heads that share B and C.
        conv_size: taps of the short convolution on x, B and C.
        dt_min, dt_max: range of the step size Δ at the start, log-uniform.
    """

    heads: int | None = None
    expand: int = 2
    state_size: int = 128
    groups: int = 1
    conv_size: int = 4
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "heads", "expand", "state_size", "groups", "conv_size", "dt_min", "dt_max")
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min is {self.dt_min} and dt_max {self.dt_max}; 0 < dt_min <= dt_max must hold")


class _Direction(nn.Module):
    """What each direction owns: convolution, step bias, decay and skip."""

    def __init__(self, inner: int, heads: int, config: Mamba2Config):
        super().__init__()
        self.heads, self.groups = heads, config.groups
        self.sizes = (inner, config.groups * config.state_size, config.groups * config.state_size)
        channels, taps = sum(self.sizes), config.conv_size
        # As nn.Conv1d, which mamba_ssm uses.
        self.conv_weight = nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-(taps**-0.5), taps**-0.5))
        dt = torch.exp(torch.empty(heads).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        # The inverse of softplus, so that softplus(dt_bias) is log-uniform.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        mark(self, "dt_bias", "A_log", "D", decay=False)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        xbc, dt = streams
        if state is not None and context.layout.cu_seqlens is None and xbc.shape[1] == 1:
            return self._step(xbc, dt, state)
        xbc, window = short_conv(
            xbc,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        x, b, c = xbc.split(self.sizes, dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        y, memory = gated_linear(
            c.unflatten(-1, (self.groups, -1)),
            b.unflatten(-1, (self.groups, -1)),
            x * dt[..., None].to(x.dtype),
            -dt * self.A_log.to(wide).exp(),
            scale=1.0,
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        y = torch.addcmul(y, x, self.D[:, None].to(x.dtype))
        return y.flatten(-2), State({"conv": window, "memory": memory})

    def _step(self, xbc: Tensor, dt: Tensor, state: State) -> tuple[Tensor, State]:
        """What `forward` returns for a decoding step, where a call takes longer than its work."""
        own = (self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D)
        y, window, memory = mamba2_step(xbc[:, 0], dt[:, 0], *own, state["conv"], state["memory"])
        return y[:, None], State({"conv": window, "memory": memory})


@register_mixer(
    "mamba2",
    Mamba2Config,
    summary="state space duality: a scalar decay per head that depends on the input",
    source="arXiv 2405.21060",
    examples=(Mamba2Config(heads=4, state_size=8), Mamba2Config(heads=2, state_size=8, groups=2, conv_size=1)),
    reference=reference,
)
class Mamba2(ScanMixer):
    """S_t = e^{-Δ_t A} S_{t-1} + Δ_t B_t x_tᵀ, y_t = S_tᵀ C_t + D x_t; a norm gated by z before it, as published."""

    def __init__(self, dim: int, config: Mamba2Config, site: Site):
        super().__init__(site)
        inner = dim * config.expand
        heads = heads_for(inner, config.heads)
        if heads % config.groups:
            raise ConfigError(f"groups is {config.groups}; it must divide the {heads} heads")
        channels = inner + 2 * config.groups * config.state_size
        self.sizes = (inner, channels, heads)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.branches = nn.ModuleList(_Direction(inner, heads, config) for _ in site.scan)
        self.norm = RMSNorm(inner, eps=site.norm_eps, groups=config.groups, norm_before_gate=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.conv_shape = (channels, config.conv_size - 1)
        self.state_shape = (heads, config.state_size, inner // heads)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        z, xbc, dt = self.in_proj(x).split(self.sizes, dim=-1)
        return (xbc, dt), z

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(mixed, kept))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State(
            {
                "conv": torch.zeros(batch, *self.conv_shape, device=device, dtype=dtype),
                "memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide),
            }
        )
