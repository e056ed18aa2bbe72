"""The one normalisation module, over `kernels.norm`."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels import norm


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467), by groups of channels and gated where asked for; see `omnimix.kernels.norm`.

    Args:
        dim: channels.
        eps: added to the mean square.
        groups: equal slices of the channels, each normalised on its own.
        gate: the gate's activation, where `forward` is given one.
        norm_before_gate: whether the gate multiplies after the normalisation (GLA) or before it (Mamba-2).
    """

    gate: Literal["silu", "sigmoid"]

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        gate: Literal["silu", "sigmoid"] = "silu",
        norm_before_gate: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.groups, self.gate, self.norm_before_gate = eps, groups, gate, norm_before_gate

    def forward(self, x: Float[Tensor, "*b d"], gate: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        return norm(
            x,
            self.weight,
            gate=gate,
            gate_activation=self.gate,
            norm_before_gate=self.norm_before_gate,
            groups=self.groups,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}"
