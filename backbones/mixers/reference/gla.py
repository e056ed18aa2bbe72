"""Gated linear attention by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, heads_of, rms_norm, silu


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t, α_t = σ(x_t W¹ W² + b)^(1/τ) (GLA, arXiv 2312.06635, sections
    4.1 and 4.4), then norm by head, times swish(x W_r), projected.

    As in the published code: o_t is divided by √d_k, the norm is RMSNorm, and the output gate has no bias. In both
    directions: ViG (arXiv 2405.18425, section 3.2), each with its gates.
    """
    heads, dim = config.heads, x.shape[-1]
    keys = max(1, round(dim * config.key_ratio / heads)) * heads
    q, k, v, gate = affine(x, mixer.in_proj).split((keys, keys, dim, dim), dim=-1)
    mixed = directions(mixer, (x, *(heads_of(s, heads) for s in (q, k, v))), causal, partial(_run, config))
    return affine(rms_norm(mixed, mixer.norm, heads) * silu(gate), mixer.out_proj)


def _run(config: Any, branch: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    alpha = torch.sigmoid(affine(affine(x, branch.gate_down), branch.gate_up)) ** (1 / config.gate_temperature)
    alpha, state, outputs = heads_of(alpha, q.shape[2]), 0, []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1).flatten(-2)
