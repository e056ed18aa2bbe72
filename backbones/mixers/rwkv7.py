"""RWKV-7 "Goose" (arXiv 2503.14456)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...kernels import delta_rule
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..parameters import mark
from ..state import State
from .base import ScanMixer, heads_for
from .parts.low_rank import LowRank
from .parts.rwkv7_start import initial_vectors, projection, rank_for
from .parts.token_shift import token_shift
from .parts.unit import LENGTH_EPS, unit
from .reference.rwkv7 import reference
from .registry import register_mixer

# Decays are exp(-e^{-1/2} σ(·)): at least 0.545 a step.
STRONGEST = math.exp(-0.5)


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(MixerConfig):
    """Options of `rwkv7`.

    Args:
        heads: 64 channels each by default.
        decay_rank, rate_rank: ranks of the projections that make the decay and the in-context rate; about 2.5 √dim in
            steps of 32 by default, as in the released code.
        gate_rank: of the output gate's; about 5 √dim in steps of 32 by default.
        value_residual: whether all layers but the first of its kind in a stage mix that one's values into theirs.
        value_rank: of the projection that says by how much; about 1.7 √dim in steps of 32 by default.
    """

    heads: int | None = None
    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None
    value_residual: bool = True
    value_rank: int | None = None

    def __post_init__(self) -> None:
        positive(self, "heads", "decay_rank", "rate_rank", "gate_rank", "value_rank")


class _Direction(nn.Module):
    """All but the output projection: every other one follows the token shift, which is causal."""

    def __init__(self, dim: int, heads: int, config: RWKV7Config, site: Site, index: int, mixes: bool):
        super().__init__()
        self.heads, self.index, self.per_use = heads, index, ("value",)
        place, rest, start = torch.arange(dim) / dim, 1 - site.layer / site.depth, initial_vectors(dim, heads, site)
        # How much of the token before is mixed into what makes r, w, k, v, a and g.
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * rest
        self.shift = nn.Parameter(1 - place ** powers[:, None])
        self.r_proj, self.k_proj, self.v_proj = (projection(dim, bound) for bound in (0.5, 0.05, 0.5))
        self.decay = LowRank(dim, rank_for(config.decay_rank, 2.5 * dim**0.5), start["decay"], nn.Tanh())
        self.rate = LowRank(dim, rank_for(config.rate_rank, 2.5 * dim**0.5), start["rate"], nn.Identity())
        self.gate = LowRank(dim, rank_for(config.gate_rank, 5 * dim**0.5), None, nn.Sigmoid())
        rank = rank_for(config.value_rank, 1.7 * dim**0.5)
        self.value = LowRank(dim, rank, start["value"], nn.Identity()) if mixes else None
        self.removal = nn.Parameter(start["removal"])
        self.replace = nn.Parameter(torch.full((dim,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, dim // heads), -0.04))
        mark(self, "shift", "removal", "replace", "bonus", decay=False)
        # Published with 64e-5 for heads of 64 channels.
        self.norm = nn.GroupNorm(heads, dim, eps=site.norm_eps * dim / heads)
        nn.init.constant_(self.norm.weight, ((site.layer + 1) / site.depth) ** 0.7)

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[tuple[Tensor, Tensor], State | None]:
        x, *first = streams
        before, last = token_shift(x, None if state is None else state["last"], context.layout.cu_seqlens)
        change = before - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, change, mix) for mix in self.shift)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        if self.value is not None:
            v = torch.lerp(v, first[self.index].to(v.dtype), self.value(xv).sigmoid().to(v.dtype))
        own, rate = v, self.rate(xa).sigmoid()
        removal = unit(k * self.removal, self.heads, LENGTH_EPS)
        k = (k * (1 + (rate - 1) * self.replace)).to(v.dtype)
        r, k, v, rate = (s.unflatten(-1, (self.heads, -1)) for s in (r, k, v, rate))
        o, memory = delta_rule(
            r,
            k,
            v,
            decay=-STRONGEST * self.decay(xw).sigmoid().unflatten(-1, (self.heads, -1)),
            a=(-rate * removal).to(v.dtype),
            b=removal,
            scale=1.0,
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        o = self.norm(o.flatten(0, 1).flatten(1)).view_as(x)
        o = o + ((r * k * self.bonus).sum(-1, keepdim=True) * v).flatten(-2)
        return (o * self.gate(xg), own), State({"last": last, "memory": memory})


@register_mixer(
    "rwkv7",
    RWKV7Config,
    summary="the delta rule with a decay and a learning rate per channel, and token shift",
    source="arXiv 2503.14456",
    examples=(RWKV7Config(heads=2, decay_rank=4, rate_rank=3, gate_rank=5), RWKV7Config(heads=4)),
    reference=reference,
)
class RWKV7(ScanMixer):
    """S_t = diag(w_t) S_{t-1} − (a_t ⊙ κ̂_t)(κ̂_tᵀ S_{t-1}) + k̃_t v_tᵀ (eq. 16-17, transposed), read by r_t.

    Normalised by head, with the bonus (r_t · ρ ⊙ k̃_t) v_t and a gate. The first layer shares its values, and later ones
    move theirs towards these by a gate of the token (value residual, section 4). In a multi-directional scan
    each direction owns all but the output projection, and has values of its own.
    """

    def __init__(self, dim: int, config: RWKV7Config, site: Site):
        super().__init__(site)
        self.dim, self.heads = dim, heads_for(dim, config.heads)
        orders = range(len(site.scan))
        self.names = [f"first_value/{dim}/{i}" for i in orders if config.value_residual]
        self.first = not site.written.issuperset(self.names)
        mixes = config.value_residual and not self.first
        self.branches = nn.ModuleList(_Direction(dim, self.heads, config, site, i, mixes) for i in orders)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out_proj.weight)
        mark(self.out_proj, "weight", initialised=True)
        self.capabilities = replace(self.capabilities, **{"writes" if self.first else "reads": frozenset(self.names)})

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        return (x, *(context.tensor(name, "RWKV7") for name in self.names if not self.first)), None

    def publish(self, more: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {name: value for name, (value,) in zip(self.names, more, strict=False)} if self.first else {}

    def finish(self, mixed: Tensor, kept: None) -> Tensor:
        return self.out_proj(mixed)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        size, wide = self.dim // self.heads, torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch, self.heads, size, size, device=device, dtype=wide)
        return State({"last": torch.zeros(batch, self.dim, 1, device=device, dtype=dtype), "memory": memory})
