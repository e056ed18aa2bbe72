"""Linear attention by its papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import affine, heads_of


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    s_i = s_{i−1} + φ(k_i) v_iᵀ, z_i = z_{i−1} + φ(k_i), y_i = φ(q_i)ᵀ s_i / φ(q_i)ᵀ z_i, with φ(x) = elu(x) + 1
    (arXiv 2006.16236, eq. 7 and 16 to 20), or φ = ReLU (EfficientViT, arXiv 2205.14756, section 3.1).

    Bidirectional: every token reads the last sums (eq. 5). `eps` on the denominator is of the published code.
    """
    q, k, v = (heads_of(s, config.heads) for s in affine(x, mixer.in_proj).chunk(3, dim=-1))
    q, k = (_features(s, config.feature_map) for s in (q, k))
    s, z, sums = 0, 0, []
    for i in range(x.shape[1]):
        s = s + k[:, i, :, :, None] * v[:, i, :, None]
        z = z + k[:, i]
        sums.append((s, z))
    outputs = []
    for i in range(x.shape[1]):
        s, z = sums[i] if causal else sums[-1]
        below = (q[:, i] * z).sum(-1, keepdim=True) + config.eps
        outputs.append((q[:, i, :, :, None] * s).sum(2) / below)
    return affine(torch.stack(outputs, 1).flatten(-2), mixer.out_proj)


def _features(x: Tensor, name: str) -> Tensor:
    if name == "relu":
        return x * (x > 0)
    return torch.where(x > 0, x + 1, torch.exp(x))
