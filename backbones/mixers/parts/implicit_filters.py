"""Long filters that a small network makes of the lag (Hyena, arXiv 2302.10866, section 3.3)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ....kernels.registry import own_precision
from ...linear import apply_wide
from ...parameters import mark


class ImplicitFilters(nn.Module):
    """Filters by lag: a network with sine activations of the position, times an exponential window (section 3.3).

    Args:
        channels: filters.
        length: unit of the positions.
        features: sines and cosines of the position that the network sees, in addition to the position itself.
        width, depth: hidden channels and hidden layers of the network.
        frequency: of its sine activations at the start.
    """

    def __init__(self, channels: int, *, length: int, features: int, width: int, depth: int, frequency: float):
        super().__init__()
        self.length, self.bands = length, features // 2
        sizes = [1 + features, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(width, channels, bias=False)
        for layer in (*self.layers, self.last):
            # The width that torch gives them spreads the filters over many frequencies.
            mark(layer, *dict(layer.named_parameters()), decay=False, initialised=True)
        self.frequency = nn.Parameter(torch.full((width,), frequency))
        mark(self, "frequency", decay=False)

    def forward(self, taps: int, wide: torch.dtype) -> Float[Tensor, "c taps"]:
        device = self.frequency.device
        place = torch.arange(taps, device=device, dtype=wide)[:, None] / self.length
        bands = torch.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands, device=device, dtype=wide)
        angle = 2 * math.pi * place * bands
        z = torch.cat([place, angle.cos(), -angle.sin()], dim=-1)
        with own_precision(device.type):
            for layer in self.layers:
                z = (self.frequency.to(wide) * apply_wide(layer, z)).sin()
            filters = apply_wide(self.last, z).t()
        # From channel to channel the window falls to a hundredth after 0.3 to 1.5 times the length.
        reach = torch.linspace(1 / 0.3, 1 / 1.5, filters.shape[0], device=device, dtype=wide)
        return filters * torch.exp(math.log(0.01) * reach[:, None] * place.t())
