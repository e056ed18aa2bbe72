"""Gated DeltaNet by its paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import affine, directions, heads_of, rms_norm, silu, softplus
from .deltanet import delta_rule


def reference(mixer: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_t = S_{t−1}(α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ (Gated DeltaNet, arXiv 2412.06464, eq. 10), in the block of
    its figure 1: short convolutions and SiLU on q, k and v, q and k of unit length, norm by head, a SiLU gate.

    α_t = exp(−A softplus(W x + b)) as in Mamba-2 (arXiv 2405.21060). As in the published code o_t is divided by √d_k.
    """
    key, _, value = mixer.sizes
    heads = mixer.heads
    qkv, beta, step, gate = affine(x, mixer.in_proj).split((2 * key + value, heads, heads, value), dim=-1)
    mixed = directions(mixer, (qkv, beta, step), causal, _run)
    return affine(rms_norm(mixed, mixer.norm, heads) * silu(gate), mixer.out_proj)


def _run(branch: nn.Module, qkv: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    return delta_rule(branch, qkv, beta, decay(branch.step, step))


def decay(layer: nn.Module, x: Tensor) -> Tensor:
    """α = exp(−A softplus(x + b)), A one a head, (b, t, h, channels / h)."""
    rate = torch.exp(layer.log_rate)
    return torch.exp(-rate[:, None] * heads_of(softplus(x + layer.bias), len(rate)))
