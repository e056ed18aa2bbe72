"""Gated DeltaNet by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, heads_of, rms_norm, silu, softplus
from .deltanet import delta_rule


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_t = S_{t−1}(α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ (Gated DeltaNet, arXiv 2412.06464, eq. 10), in the block of
    its figure 1: short convolutions and SiLU on q, k and v, q and k of unit length, norm by head, a SiLU gate.

    α_t = exp(−A softplus(W x + b)) as in Mamba-2 (arXiv 2405.21060). As in the published code o_t is divided by √d_k.
    """
    heads = config.heads
    key, value = (round(x.shape[-1] * ratio / heads) * heads for ratio in (config.key_ratio, config.value_ratio))
    qkv, beta, step, gate = affine(x, mixer.in_proj).split((2 * key + value, heads, heads, value), dim=-1)
    mixed = directions(mixer, (qkv, beta, step), causal, partial(_run, config, (key, key, value)))
    return affine(rms_norm(mixed, mixer.norm, heads) * silu(gate), mixer.out_proj)


def _run(config: Any, sizes: tuple[int, ...], branch: Any, qkv: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    return delta_rule(config, sizes, branch, qkv, beta, decay(branch.step, step, config.heads))


def decay(layer: Any, x: Tensor, heads: int) -> Tensor:
    """α = exp(−A softplus(x + b)), A one a head, (b, t, h, channels / h)."""
    rate = torch.exp(layer.log_rate)
    return torch.exp(-rate[:, None] * heads_of(softplus(x + layer.bias), heads))
