"""Streaming convolutions over time, and the positions of their outputs."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...utils.modes import own_precision


def sinusoids(length: int, dim: int, *, start: int = 0, device: torch.device) -> Float[Tensor, "length dim"]:
    """Positions `start` and on as sines, then cosines, of wavelengths from 2π to 20000π (Whisper, arXiv 2212.04356)."""
    steps = torch.arange(start, start + length, device=device, dtype=torch.float32)
    # In torch's default dtype they would be as coarse as that.
    steps_of_rate = torch.arange(dim // 2, device=device, dtype=torch.float32)
    rates = torch.exp(steps_of_rate * (-math.log(10_000) / max(1, dim // 2 - 1)))
    angles = steps[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class Convolution(nn.Module):
    """A strided convolution over time between (b, t, c) and (b, t', c').

    Args:
        pad: zeros on the left and right.
        wide: compute in float32 (float64 where the weights are) whatever the precision of the model: of the samples of
            a wave bfloat16 would keep eight bits.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int, *, pad: tuple[int, int] = (0, 0), wide: bool = False
    ):
        super().__init__()
        self.stride, self.pad, self.wide = stride, pad, wide
        self.weight = nn.Parameter(torch.empty(out, channels, kernel))
        self.bias = nn.Parameter(torch.zeros(out))
        nn.init.trunc_normal_(self.weight, std=(channels * kernel) ** -0.5)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b s d"]:
        return self._convolved(F.pad(x.to(self._dtype), (0, 0, *self.pad)))

    def stream(
        self, x: Float[Tensor, "b t c"], kept: Float[Tensor, "b m c"] | None = None
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b k c"]]:
        """The steps that are complete when `x` has followed on the inputs `kept`, and what to keep now.

        Without padding on the right; `kept` begins as the zeros on the left.
        """
        x = x.to(self._dtype)
        x = F.pad(x, (0, 0, self.pad[0], 0)) if kept is None else torch.cat([kept, x], dim=1)
        out, _, kernel = self.weight.shape
        steps = max(0, (x.shape[1] - kernel) // self.stride + 1)
        y = self._convolved(x) if steps else x.new_zeros(x.shape[0], 0, out)
        return y, x[:, steps * self.stride :].clone()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32) if self.wide else self.weight.dtype

    def _convolved(self, x: Tensor) -> Tensor:
        # Consecutive steps in memory are an image of one row whose channels come last. On CPUs its convolution is twice
        # as fast as one in one dimension.
        weight, bias = self.weight.unsqueeze(2).to(x.dtype), self.bias.to(x.dtype)
        with own_precision(x.device.type) if self.wide else nullcontext():
            return F.conv2d(x.mT.unsqueeze(2), weight, bias, stride=(1, self.stride)).squeeze(2).mT
