"""S4D, a diagonal state space model that does not depend on the input (arXiv 2206.11893)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import long_conv
from ...kernels.long_conv.diagonal import Pair, discounted_sum, geometric_sum, multiply, powers
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..layout import Layout
from ..parameters import mark
from ..state import State
from .base import ScanMixer
from .reference.s4d import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class S4DConfig(MixerConfig):
    """Options of `s4d`.

    Args:
        state_size: N; N / 2 complex states a channel, whose conjugates are implied.
        init: of A: "lin" (frequencies πn) or "inv" (inverse frequencies, after HiPPO-LegS).
        dt_min, dt_max: range of the step size Δ at the start, log-uniform.
    """

    state_size: int = 64
    init: Literal["lin", "inv"] = "lin"
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "state_size", "dt_min", "dt_max")
        if self.state_size % 2:
            raise ConfigError(f"state_size is {self.state_size}; it must be even, for conjugate pairs")
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min is {self.dt_min} and dt_max {self.dt_max}; 0 < dt_min <= dt_max must hold")


class _Direction(nn.Module):
    """What each direction owns: Δ, A, C and the skip D; B is 1, for only its product with C matters."""

    def __init__(self, dim: int, config: S4DConfig):
        super().__init__()
        size, n = config.state_size, torch.arange(config.state_size // 2)
        frequency = math.pi * n if config.init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
        log_dt = torch.empty(dim).uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.log_dt = nn.Parameter(log_dt)
        self.A_log = nn.Parameter(torch.full((dim, size // 2), 0.5).log())
        self.A_imag = nn.Parameter(frequency.expand(dim, -1).clone())
        self.C = nn.Parameter(torch.randn(dim, size // 2, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(dim))
        mark(self, "log_dt", "A_log", "A_imag", "D", decay=False)

    def discretised(self, wide: torch.dtype) -> tuple[Pair, Pair]:
        """ΔA, and 2 C B̄ with B̄ = (e^{ΔA} − 1) / A (zero-order hold; the 2 for the conjugates)."""
        dt, real, imaginary = self.log_dt.to(wide).exp()[:, None], -self.A_log.to(wide).exp(), self.A_imag.to(wide)
        log_a = dt * real, dt * imaginary
        # e^{ΔA} − 1 without cancellation where Δ is small.
        less_one = (
            torch.expm1(log_a[0]) * log_a[1].cos() - 2 * (log_a[1] / 2).sin().square(),
            log_a[0].exp() * log_a[1].sin(),
        )
        size = real.square() + imaginary.square()
        held = multiply(less_one, (real / size, -imaginary / size))
        c_real, c_imaginary = (2 * self.C.to(wide)).unbind(-1)
        return log_a, multiply(held, (c_real, c_imaginary))

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        layout = context.layout
        (u,) = streams
        wide = torch.promote_types(u.dtype, torch.float32)
        log_a, c = self.discretised(wide)
        filters = geometric_sum((c[0][None], c[1][None]), log_a, u.shape[1])[0]
        y, _ = long_conv(u, filters, skip=self.D, cu_seqlens=layout.cu_seqlens)
        if not layout.causal:
            return y, None
        lengths, place = layout.lengths(u), layout.positions(u)
        packed = layout.cu_seqlens is not None
        longest = int(lengths.max()) if packed else u.shape[1]
        memory = discounted_sum(_mirrored(u, layout, lengths, longest).to(wide), log_a)
        if state is not None:
            before = tuple(state["memory"].to(wide).unbind(-1))
            real, imaginary = powers(log_a, lengths.to(wide))
            decayed = multiply(before, (real.permute(2, 0, 1), imaginary.permute(2, 0, 1)))
            memory = memory[0] + decayed[0], memory[1] + decayed[1]
            # y_t sees the state as C A^{t+1} h.
            real, imaginary = powers(log_a, lengths.new_ones(1).to(wide))
            seen = multiply(multiply(before, c), (real[..., 0], imaginary[..., 0]))
            carried = geometric_sum(seen, log_a, longest).transpose(1, 2)
            if packed:
                owner = torch.repeat_interleave(lengths, output_size=u.shape[1])
                carried = carried[owner, place[0]][None]
            y = y + carried.to(y.dtype)
        return y, State({"memory": torch.stack(memory, dim=-1)})


def _mirrored(u: Tensor, layout: Layout, lengths: Tensor, longest: int) -> Tensor:
    """Each sequence from its last token back to its first, then zeros: (n, longest, d)."""
    if layout.cu_seqlens is None:
        return u.flip(1)
    steps = torch.arange(longest, device=u.device)
    index = layout.cu_seqlens.long()[1:, None] - 1 - steps
    inside = steps < lengths[:, None]
    return torch.where(inside[..., None], u[0][index.clamp(min=0)], 0)


@register_mixer(
    "s4d",
    S4DConfig,
    summary="diagonal state space model with fixed dynamics, run as a long convolution",
    source="arXiv 2206.11893",
    examples=(S4DConfig(state_size=4), S4DConfig(state_size=6, init="inv")),
    reference=reference,
)
class S4D(ScanMixer):
    """h_t = e^{ΔA} h_{t-1} + B̄ u_t, y_t = 2 Re C h_t + D u_t per channel; then GELU and a gated linear layer."""

    def __init__(self, dim: int, config: S4DConfig, site: Site):
        super().__init__(site)
        self.branches = nn.ModuleList(_Direction(dim, config) for _ in site.scan)
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.state_shape = (dim, config.state_size // 2, 2)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        return (x,), None

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return F.glu(self.out_proj(F.gelu(mixed)), dim=-1)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State({"memory": torch.zeros(batch, *self.state_shape, device=device, dtype=wide)})
