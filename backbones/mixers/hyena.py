"""Hyena: gates and long filters that a small network makes of the lag (arXiv 2302.10866)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import long_conv, short_conv
from ..config import DEEPEST, MixerConfig, Site, bounded, positive
from ..context import Context
from ..parameters import mark
from ..state import State
from .base import ScanMixer
from .parts.implicit_filters import ImplicitFilters
from .reference.hyena import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(MixerConfig):
    """Options of `hyena`.

    Args:
        order: gates a channel, at least 2; order - 1 long convolutions stand between them.
        length: taps of the long filters: how far back a token sees, and so the size of the state. It is the unit of
            the positions too, whatever the sequence's length.
        conv_size: taps of the short convolution.
        features: sines and cosines of the position that the filter network sees, in addition to the position itself.
        filter_dim, filter_depth: hidden channels and hidden layers of the filter network.
        frequency: of its sine activations at the start.
    """

    order: int = 2
    length: int = 1024
    conv_size: int = 3
    features: int = 4
    filter_dim: int = 64
    filter_depth: int = 3
    frequency: float = 10.0

    def __post_init__(self) -> None:
        positive(self, "length", "conv_size", "features", "filter_dim", "frequency")
        positive(self, "order", "filter_depth", most=DEEPEST)
        bounded(self, "order", least=2, wanted="at least 2")
        if self.features % 2:
            raise ConfigError(f"features is {self.features}; it must be even, a sine and a cosine each")


class _Direction(nn.Module):
    """What each direction owns: the short convolution, the long filters and the skip connections."""

    def __init__(self, dim: int, config: HyenaConfig):
        super().__init__()
        self.config, taps, channels = config, config.conv_size, dim * (config.order + 1)
        self.conv_weight = nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.filters = ImplicitFilters(
            dim * (config.order - 1),
            length=config.length,
            features=config.features,
            width=config.filter_dim,
            depth=config.filter_depth,
            frequency=config.frequency,
        )
        self.skip = nn.Parameter(torch.randn(config.order - 1, dim))
        mark(self, "skip", decay=False)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        (x,), convolutions, length = streams, self.config.order - 1, self.config.length
        x, window = short_conv(
            x,
            self.conv_weight,
            self.conv_bias,
            initial_state=None if state is None else state["conv"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        out_gate, *gates, z = x.chunk(convolutions + 2, dim=-1)
        # Without a past no lag beyond the sequence matters; one tap more keeps all of its inputs.
        taps = length if state is not None else min(x.shape[1] + 1, length)
        filters = self.filters(taps, torch.promote_types(x.dtype, torch.float32)).chunk(convolutions)
        before = [None] * convolutions if state is None else state["inputs"].chunk(convolutions, dim=1)
        kept = []
        for gate, taps_by_lag, skip, past in zip(gates, filters, self.skip, before, strict=True):
            z, inputs = long_conv(
                z * gate, taps_by_lag, skip=skip, initial_state=past, cu_seqlens=context.layout.cu_seqlens
            )
            kept.append(inputs)
        if not context.layout.causal:
            return z * out_gate, None
        inputs = F.pad(torch.cat(kept, dim=1), (length - taps, 0))
        return z * out_gate, State({"conv": window, "inputs": inputs})


@register_mixer(
    "hyena",
    HyenaConfig,
    summary="long convolutions with implicit filters, between gates",
    source="arXiv 2302.10866",
    examples=(HyenaConfig(length=40, filter_dim=8), HyenaConfig(order=3, length=6, filter_dim=8, filter_depth=1)),
    reference=reference,
)
class Hyena(ScanMixer):
    """y = x⁰ ⊙ (h * (x¹ ⊙ v)) at order 2, of projections after a short convolution; each call makes new filters."""

    def __init__(self, dim: int, config: HyenaConfig, site: Site):
        super().__init__(site)
        self.in_proj = nn.Linear(dim, dim * (config.order + 1))
        self.branches = nn.ModuleList(_Direction(dim, config) for _ in site.scan)
        self.out_proj = nn.Linear(dim, dim)
        self.conv_shape = (dim * (config.order + 1), config.conv_size - 1)
        self.state_shape = (dim * (config.order - 1), config.length - 1)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        return (self.in_proj(x),), None

    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        return self.out_proj(mixed)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return State(
            {
                "conv": torch.zeros(batch, *self.conv_shape, device=device, dtype=dtype),
                "inputs": torch.zeros(batch, *self.state_shape, device=device, dtype=dtype),
            }
        )
