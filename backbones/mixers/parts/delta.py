"""What DeltaNet and its variants share: projections to q, k, v and β, short convolutions, the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels import delta_rule, short_conv
from ...config import Site
from ...context import Context
from ...state import State
from ..base import ScanMixer
from .unit import unit


class DeltaDirection(nn.Module):
    """What each direction owns: its convolution, and in DeltaNet's variants its decay.

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
    """Projections to q, k, v and β, shared by the directions, and back; subclasses add branches, gates and the norm."""

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
