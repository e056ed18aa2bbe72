"""The one linear layer, over `kernels.linear`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..kernels import linear


class Linear(nn.Linear):
    """torch's, which reads its weights at the memory's speed where it is given a few rows only: in decoding."""

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """x Wᵀ + b."""
        return linear(x, self.weight, self.bias)
