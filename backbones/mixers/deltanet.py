"""DeltaNet (arXiv 2406.06484), and what its gated kin share with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import delta_rule, norm, short_conv
from ..config import MixerConfig, Site, positive
from ..context import Context
from ..linear import Linear
from ..norm import RMSNorm
from ..state import State
from .base import ScanMixer, heads_for
from .reference.deltanet import reference
from .registry import register_mixer


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    """Options of `deltanet`.

    Args:
        heads: 64 channels each by default.
        conv_size: taps of the short convolution on q, k and v.
        negative: whether β reaches up to 2, and the state's transitions have eigenvalues down to -1 (arXiv 2411.12537).
    """

    heads: int | None = None
    conv_size: int = 4
    negative: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "conv_size")


def unit(x: Tensor, heads: int) -> Tensor:
    """`(b, t, d)` -> `(b, t, h, d / h)`, each head of length 1."""
    size = x.shape[-1] // heads
    # An RMS of size ** -0.5 is a length of 1.
    weight = torch.full((x.shape[-1],), size**-0.5, dtype=x.dtype, device=x.device)
    return norm(x, weight, groups=heads, eps=1e-6 / size).unflatten(-1, (heads, -1))


class DeltaDirection(nn.Module):
    """What each direction owns: its convolution, and in kin of DeltaNet its decay.

    Args:
        heads: of q, k and v alike.
        sizes: channels of q, k and v.
        conv_size: taps.
        most: the largest β.
    """

    def __init__(self, heads: int, sizes: tuple[int, int, int], conv_size: int, most: float):
        super().__init__()
        self.heads, self.sizes, self.most = heads, sizes, most
        self.conv_weight = nn.Parameter(torch.empty(sum(sizes), conv_size).uniform_(-1, 1) * conv_size**-0.5)

    def decay(self, *gates: Tensor) -> Tensor | None:
        """The log decay, `(b, t, h)` or `(b, t, h, k)`, from the streams after qkv and β."""
        return None

    def forward(
        self, streams: tuple[Tensor, ...], context: Context, state: State | None
    ) -> tuple[Tensor, State | None]:
        qkv, beta, *gates = streams
        qkv, window = short_conv(
            qkv,
            self.conv_weight,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        q, k, v = qkv.split(self.sizes, dim=-1)
        wide = torch.promote_types(beta.dtype, torch.float32)
        o, memory = delta_rule(
            unit(q, self.heads),
            unit(k, self.heads),
            v.unflatten(-1, (self.heads, -1)),
            beta.to(wide).sigmoid() * self.most,
            self.decay(*gates),
            initial_state=None if state is None else state["memory"],
            cu_seqlens=context.layout.cu_seqlens,
        )
        return o.flatten(-2), State({"conv": window, "memory": memory})


class DeltaMixer(ScanMixer):
    """Projections to q, k, v and β, shared by the directions, and back; its heirs add branches, gates and the norm."""

    def __init__(self, site: Site, heads: int, sizes: tuple[int, int, int], conv_size: int):
        super().__init__(site)
        self.heads, self.sizes, self.taps = heads, sizes, conv_size

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        key, value = (size // self.heads for size in self.sizes[1:])
        wide = torch.promote_types(dtype, torch.float32)
        return State(
            {
                "conv": torch.zeros(batch, sum(self.sizes), self.taps - 1, device=device, dtype=dtype),
                "memory": torch.zeros(batch, self.heads, key, value, device=device, dtype=wide),
            }
        )


@register_mixer(
    "deltanet",
    DeltaNetConfig,
    summary="linear attention that replaces what its state holds for a key",
    source="arXiv 2406.06484",
    examples=(DeltaNetConfig(heads=2), DeltaNetConfig(heads=4, conv_size=1, negative=True)),
    reference=reference,
)
class DeltaNet(DeltaMixer):
    """S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ with unit q and k, β_t = σ(w x_t); normalised by head."""

    def __init__(self, dim: int, config: DeltaNetConfig, site: Site):
        heads, sizes = heads_for(dim, config.heads), (dim, dim, dim)
        super().__init__(site, heads, sizes, config.conv_size)
        self.in_proj = Linear(dim, sum(sizes) + heads, bias=False)
        self.branches = nn.ModuleList(
            DeltaDirection(heads, sizes, config.conv_size, 2.0 if config.negative else 1.0) for _ in site.scan
        )
        self.norm = RMSNorm(dim, eps=site.norm_eps, groups=heads)
        self.out_proj = Linear(dim, dim, bias=False)

    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], None]:
        return self.in_proj(x).split((sum(self.sizes), self.heads), dim=-1), None

    def finish(self, mixed: Tensor, kept: None) -> Tensor:
        return self.out_proj(self.norm(mixed))
