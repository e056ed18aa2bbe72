"""Kimi Delta Attention by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, rms_norm
from .deltanet import delta_rule
from .gated_deltanet import decay


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t (Kimi Linear, arXiv 2510.26692, eq. 1),
    q and k L2-normalised after a short convolution and Swish, v after these, β = σ(W x), α = f(W↑ W↓ x) channel by
    channel; o = W_o(σ(W↑ W↓ x) ⊙ RMSNorm(o)), the norm by head (its section on the neural parameterization).

    f is the decay of Mamba-2, with A a head and a bias a channel; o_t is divided by √d_k, as in the published code.
    """
    dim, heads = x.shape[-1], config.heads
    widths = (3 * dim, heads, config.gate_rank or dim // heads)
    qkv, beta, gate = affine(x, mixer.in_proj).split(widths, dim=-1)
    mixed = directions(mixer, (qkv, beta, x), causal, partial(_run, config))
    gate = torch.sigmoid(affine(gate, mixer.gate_up))
    return affine(rms_norm(mixed, mixer.norm, heads) * gate, mixer.out_proj)


def _run(config: Any, branch: Any, qkv: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    step = affine(affine(x, branch.decay_down), branch.decay_up)
    return delta_rule(config, (x.shape[-1],) * 3, branch, qkv, beta, decay(branch.step, step, config.heads))
