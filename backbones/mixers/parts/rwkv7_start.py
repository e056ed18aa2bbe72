"""What RWKV-7 starts with: its ranks and initial values, as in BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config import Site
from ...parameters import mark


def rank_for(configured: int | None, published: float) -> int:
    """The configured rank, or the published one in steps of 32, at least 32."""
    return configured or max(32, round(published / 32) * 32)


def projection(dim: int, bound: float) -> nn.Linear:
    """A square projection whose weights are uniform in ± bound / √dim."""
    layer = nn.Linear(dim, dim, bias=False)
    nn.init.uniform_(layer.weight, -bound * dim**-0.5, bound * dim**-0.5)
    mark(layer, "weight", initialised=True)
    return layer


def initial_vectors(dim: int, heads: int, site: Site) -> dict[str, Tensor]:
    """By channel: "decay" (published as w0), "rate" (a0), "value" (v0) and "removal" (k_k)."""
    channel, half = torch.arange(dim), (dim // heads - 1) / 2
    place = channel / max(1, dim - 1)
    # From -1 to 1 within each head, flat in the middle.
    zigzag = (channel % (dim // heads) - half) / max(half, 0.5)
    zigzag, linear = zigzag * zigzag.abs(), place - 0.5
    deep = site.layer / max(1, site.depth - 1)
    return {
        "decay": -5.5 + 6 * place ** (1 + deep**0.3) + 2.5 * zigzag,
        "rate": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "value": 0.73 - 0.4 * linear,
        "removal": 0.71 - 0.1 * linear,
    }
