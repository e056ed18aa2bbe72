"""Retention by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, heads_of, rms_norm, rotate, silu


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_n = γ S_{n−1} + K_nᵀ V_n, o_n = Q_n S_n with Q and K rotated by e^{inθ} and γ = 1 − 2^(−5−h) (RetNet, arXiv
    2307.08621, eq. 6 and 8), then norm by head, times swish(X W_G), projected (eq. 8).

    As in the published code: o_n is divided by √d_k, and the norm is RMSNorm. Bidirectional: the mean of two
    directions.
    """
    heads, dim = config.heads, x.shape[-1]
    values = dim * config.value_ratio
    q, k, v, gate = affine(x, mixer.in_proj).split((dim, dim, values, values), dim=-1)
    mixed = directions(mixer, [heads_of(s, heads) for s in (q, k, v)], causal, partial(_run, config))
    return affine(rms_norm(mixed, mixer.norm, heads) * silu(gate), mixer.out_proj)


def _run(config: Any, _: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, place, state, outputs = config.heads, torch.arange(q.shape[1]), 0, []
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=q.dtype)[:, None, None]
    q, k = rotate(q, place, config.rope_base), rotate(k, place, config.rope_base)
    for n in range(q.shape[1]):
        state = gamma * state + k[:, n, :, :, None] * v[:, n, :, None]
        outputs.append((q[:, n, :, :, None] * state).sum(2) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1).flatten(-2)
