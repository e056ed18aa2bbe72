"""Mamba, the selective state space model S6 (arXiv 2312.00752)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import selective_scan, short_conv
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..linear import without_bias
from ..parameters import mark
from ..state import State
from .base import ScanMixer
from .reference.mamba import reference
from .registry import register_mixer

# The smallest step size at the start, as in the published code.
DT_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Options of `mamba`.

    Args:
        expand: inner channels per channel of the model.
        state_size: N, the size of the state per channel.
        conv_size: taps of the short convolution.
        dt_rank: rank of the projection that makes Δ; a sixteenth of the model's channels by default.
        dt_min, dt_max: range of the step size Δ at the start, log-uniform.
    """

    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "expand", "state_size", "conv_size", "dt_rank", "dt_min", "dt_max")
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min is {self.dt_min} and dt_max {self.dt_max}; 0 < dt_min <= dt_max must hold")


class _Direction(nn.Module):
    """What each direction owns: the convolution, what makes Δ, B and C of it, A and D."""

    def __init__(self, inner: int, rank: int, config: MambaConfig):
        super().__init__()
        taps, n = config.conv_size, config.state_size
        self.sizes = (rank, n, n)
        # As nn.Conv1d, which mamba_ssm uses.
        self.conv_weight = nn.Parameter(torch.empty(inner, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-(taps**-0.5), taps**-0.5))
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        # Section 3.6: Δ = softplus(bias + W dt), W of unit gain, softplus(bias) log-uniform in [dt_min, dt_max].
        self.dt_proj = nn.Linear(rank, inner)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.empty(inner).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        mark(self.dt_proj, "weight", "bias", initialised=True)
        # S4D-Real: A_n = -(n + 1).
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        mark(self, "A_log", "D", decay=False)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        x, z = streams
        x, window = short_conv(
            x,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        dt, b, c = self.x_proj(x).split(self.sizes, dim=-1)
        dt, bias = without_bias(self.dt_proj, dt)
        wide = torch.promote_types(x.dtype, torch.float32)
        y, memory = selective_scan(
            x,
            dt,
            -self.A_log.to(wide).exp(),
            b.unsqueeze(2),
            c.unsqueeze(2),
            D=self.D,
            z=z,
            delta_bias=bias,
            delta_softplus=True,
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        return y, State({"conv": window, "memory": memory})


@register_mixer(
    "mamba",
    MambaConfig,
    summary="selective state space: step size, input and output depend on the input",
    source="arXiv 2312.00752",
    examples=(MambaConfig(state_size=4), MambaConfig(expand=1, state_size=3, conv_size=1, dt_rank=5)),
    reference=reference,
)
class Mamba(ScanMixer):
    """h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t, y_t = (C_t h_t + D x_t) silu(z_t), after a short convolution.

    Multi-directional scans: Vim (arXiv 2401.09417, forward and backward) and VMamba (arXiv 2401.10166, cross-scan).
    """

    def __init__(self, dim: int, config: MambaConfig, site: Site):
        super().__init__(site)
        inner = dim * config.expand
        rank = config.dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.branches = nn.ModuleList(_Direction(inner, rank, config) for _ in site.scan)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.conv_shape, self.state_shape = (inner, config.conv_size - 1), (inner, config.state_size)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        # The gate goes along with each direction, whose kernel applies it as it writes.
        return tuple(self.in_proj(x).chunk(2, dim=-1)), None

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(mixed)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State(
            {
                "conv": torch.zeros(batch, *self.conv_shape, device=device, dtype=dtype),
                "memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide),
            }
        )
