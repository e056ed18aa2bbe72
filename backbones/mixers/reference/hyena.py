"""Hyena by its paper."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, short_convolution


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    z¹ = v, zⁿ⁺¹ = xⁿ ⊙ (hⁿ * zⁿ), y = zᴺ⁺¹ (Hyena, arXiv 2302.10866, definition 3.1), of projections after a short
    convolution (algorithm 1), with filters h_t = Window(t) · FFN(PositionalEncoding(t)) (section 3.3).

    As in the published code N gates stand around N − 1 filters: z is multiplied by a gate before each filter and by the
    last gate after all, and each filter has a skip. The projections are x⁰ (last gate), the other gates, and v. Lags
    of `length` and more have no tap, and `length` is the unit of positions. Bidirectional: the mean of two directions.
    """
    return affine(directions(mixer, (affine(x, mixer.in_proj),), causal, partial(_run, config)), mixer.out_proj)


def _run(config: Any, branch: Any, x: Tensor) -> Tensor:
    order = config.order
    x = short_convolution(x, branch.conv_weight, branch.conv_bias)
    last, *gates, z = x.chunk(order + 1, dim=-1)
    h = _filters(config, branch.filters, min(x.shape[1], config.length)).chunk(order - 1, dim=-1)
    for gate, taps, skip in zip(gates, h, branch.skip, strict=True):
        u, outputs = z * gate, []
        for t in range(x.shape[1]):
            y = skip * u[:, t]
            for lag in range(min(t + 1, len(taps))):
                y = y + taps[lag] * u[:, t - lag]
            outputs.append(y)
        z = torch.stack(outputs, 1)
    return last * z


def _filters(config: Any, network: Any, taps: int) -> Tensor:
    """The filters by lag, (taps, channels)."""
    bands, rows = config.features // 2, []
    frequencies = [1e-4 + i * (bands - 1 - 1e-4) / (bands - 1) if bands > 1 else 1e-4 for i in range(bands)]
    channels = len(network.last.weight)
    for lag in range(taps):
        t = lag / config.length
        encoded = [t]
        encoded += [math.cos(2 * math.pi * f * t) for f in frequencies]
        encoded += [-math.sin(2 * math.pi * f * t) for f in frequencies]
        z = torch.tensor(encoded, dtype=network.frequency.dtype)
        for layer in network.layers:
            z = torch.sin(network.frequency * affine(z, layer))
        # The window falls to 0.01 after 0.3 (first channel) to 1.5 times the length (last channel).
        rates = torch.linspace(1 / 0.3, 1 / 1.5, channels, dtype=z.dtype)
        rows.append(affine(z, network.last) * 0.01 ** (rates * t))
    return torch.stack(rows)
