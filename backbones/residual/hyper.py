"""Hyper-connections: several copies of the stream, mixed and written to with learned weights (arXiv 2409.19606)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ResidualConfig, Site, positive
from ..context import Context
from ..layer import Output, SequenceLayer
from ..norm import RMSNorm
from ..parameters import mark
from ..state import State
from .base import Residual, register_residual


@dataclass(frozen=True, kw_only=True)
class HyperConfig(ResidualConfig):
    """Options of `hyper`.

    Args:
        rate: copies of the stream, n.
        dynamic: whether the weights also depend on the token.
    """

    rate: int = 4
    dynamic: bool = True

    def __post_init__(self) -> None:
        positive(self, "rate")


@register_residual(
    "hyper",
    HyperConfig,
    summary="n copies of the stream, mixed and written to with learned weights",
    source="arXiv 2409.19606",
    examples=(HyperConfig(rate=2), HyperConfig(rate=3, dynamic=False)),
)
class Hyper(Residual):
    """ĥ = Aᵀ_m H, H' = Aᵀ_r H + Bᵀ f(norm(ĥ))ᵀ over the n copies H (eq. 1 to 4).

    Dynamic weights add s · tanh(norm(H) W) to the static ones (eq. 6 to 9); W starts at zero, so that at the start the
    sum of the copies is a plain pre-norm stream's.
    """

    def __init__(self, dim: int, config: HyperConfig, site: Site, drop_path: float):
        super().__init__(dim, config, site, drop_path)
        n = config.rate
        self.rate, self.norm = n, RMSNorm(dim, eps=site.norm_eps)
        self.stream = f"{n} copies"
        read = torch.zeros(n, 1)
        # Each layer reads another copy at the start (eq. 14).
        read[site.layer % n] = 1.0
        self.mix = nn.Parameter(torch.cat([read, torch.eye(n)], dim=1))
        self.write = nn.Parameter(torch.ones(n))
        mark(self, "mix", "write", decay=False)
        self.dynamic = None
        if config.dynamic:
            self.copies_norm = RMSNorm(dim, eps=site.norm_eps)
            self.dynamic = nn.Linear(dim, n + 2, bias=False)
            nn.init.zeros_(self.dynamic.weight)
            mark(self.dynamic, "weight", initialised=True)
            self.strength = nn.Parameter(torch.full((2,), 0.01))
            mark(self, "strength", decay=False)

    def open(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.rate, x.shape[-1])

    def close(self, stream: Tensor) -> Tensor:
        return stream.sum(-2)

    def forward(self, stream: Tensor, layer: SequenceLayer, context: Context, state: State | None) -> Output:
        mix, write = self.mix.to(stream.dtype), self.write.to(stream.dtype)
        if self.dynamic is not None:
            strength = self.strength.to(stream.dtype)
            more = self.dynamic(self.copies_norm(stream)).tanh()
            mix, write = mix + strength[0] * more[..., :-1], write + strength[1] * more[..., -1]
        mixed = mix.mT @ stream
        out = layer(self.norm(mixed[..., 0, :]), context, state)
        y = self.dropped(out.y, context)
        return out._replace(y=mixed[..., 1:, :] + write[..., None] * y.unsqueeze(-2))
