"""The recurrent block of Griffin: the real-gated linear recurrent unit, RG-LRU (arXiv 2402.19427)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_recurrence, short_conv
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..parameters import mark
from ..state import State
from .base import ScanMixer
from .reference.rglru import reference
from .registry import register_mixer

# Keeps the gradient of the input's scale finite where nothing is forgotten.
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    """Options of `rglru`.

    Args:
        expand: inner channels per channel of the model, rounded up to whole blocks.
        blocks: of the block-diagonal matrices that make the gates.
        conv_size: taps of the short convolution.
        exponent: c; the recurrence gate r forgets by σ(Λ)^(c r).
    """

    expand: float = 4 / 3
    blocks: int = 16
    conv_size: int = 4
    exponent: float = 8.0

    def __post_init__(self) -> None:
        positive(self, "expand", "blocks", "conv_size", "exponent")


class _Direction(nn.Module):
    """What each direction owns: the convolution, the gates and the decay.

    They start as in google-deepmind/recurrentgemma, recurrentgemma/torch/layers.py.
    """

    def __init__(self, inner: int, config: RGLRUConfig):
        super().__init__()
        self.blocks, self.exponent = config.blocks, config.exponent
        taps, size = config.conv_size, inner // config.blocks
        self.conv_weight = nn.Parameter(torch.empty(inner, taps).normal_(std=(0.01 / taps) ** 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        # Recurrence and input gate side by side, one matrix a block.
        self.gate_weight = nn.Parameter(torch.empty(config.blocks, size, 2 * size).normal_(std=size**-0.5))
        self.gate_bias = nn.Parameter(torch.zeros(config.blocks, 1, 2 * size))
        # σ(Λ) is uniform over the ring from 0.9 to 0.999, by area: σ(Λ) itself, as released, and not σ(Λ)^c (section
        # 2.4). Λ from its logarithm.
        log_a = torch.empty(inner).uniform_(0.9**2, 0.999**2).log() / 2
        self.decay = nn.Parameter(log_a - torch.log(-torch.expm1(log_a)))
        mark(self, "decay", "gate_bias", decay=False)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        x, window = short_conv(
            streams[0],
            self.conv_weight,
            self.conv_bias,
            initial_state=None if state is None else state["conv"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        blocks = x.unflatten(-1, (self.blocks, -1)).flatten(0, 1).transpose(0, 1)
        gates = torch.baddbmm(self.gate_bias, blocks, self.gate_weight).to(wide).sigmoid()
        r, i = gates.transpose(0, 1).unflatten(0, x.shape[:2]).chunk(2, dim=-1)
        log_a = -self.exponent * F.softplus(-self.decay.to(wide)) * r.flatten(-2)
        scale = torch.sqrt(TINY - torch.expm1(2 * log_a))
        h, memory = linear_recurrence(
            scale * i.flatten(-2) * x.to(wide),
            log_a.exp(),
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        return h.to(x.dtype), State({"conv": window, "memory": memory})


@register_mixer(
    "rglru",
    RGLRUConfig,
    summary="Griffin's gated linear recurrent unit: a state of one number a channel",
    source="arXiv 2402.19427",
    examples=(RGLRUConfig(blocks=4), RGLRUConfig(expand=1.0, blocks=2, conv_size=1)),
    reference=reference,
)
class RGLRU(ScanMixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t²) (i_t x_t) with a_t = σ(Λ)^(c r_t); times gelu of a parallel branch.

    Gates r_t and i_t are sigmoids of block-diagonal maps of x_t, which comes from a short convolution (eq. 1 to 4).
    """

    def __init__(self, dim: int, config: RGLRUConfig, site: Site):
        super().__init__(site)
        inner = math.ceil(dim * config.expand / config.blocks) * config.blocks
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.branches = nn.ModuleList(_Direction(inner, config) for _ in site.scan)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.normal_(self.in_proj.weight, std=dim**-0.5)
        mark(self.in_proj, "weight", initialised=True)
        # A backbone divides it by the root of its branches, two a block: √(2 / depth) / √inner is left, as released
        # (recurrentgemma/torch/modules.py, griffin.py).
        nn.init.normal_(self.out_proj.weight, std=2 * inner**-0.5)
        mark(self.out_proj, "weight", initialised=True)
        self.conv_shape = (inner, config.conv_size - 1)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        return (x,), gate

    def finish(self, mixed: Tensor, kept: Tensor) -> Tensor:
        return self.out_proj(mixed * F.gelu(kept, approximate="tanh"))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return State(
            {
                "conv": torch.zeros(batch, *self.conv_shape, device=device, dtype=dtype),
                "memory": torch.zeros(batch, self.conv_shape[0], device=device, dtype=wide),
            }
        )
