"""RWKV-7 by its paper."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import EPS, affine, directions, heads_of, unit


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    The time mixing of RWKV-7 (arXiv 2503.14456, section 4).

    x_□ = x_t + (x_{t−1} − x_t) μ_□; w = exp(−e^{−1/2} σ(lora_w)), a = σ(lora_a), g = lora_g with a sigmoid inside;
    κ = k ⊙ ξ, κ̂ its head's direction, of length 1 however short κ is (as in the published code),
    k̃ = k ⊙ lerp(1, a, α); S_t = S_{t−1}(diag(w) − κ̂ᵀ(a ⊙ κ̂)) + vᵀ k̃ (eq. 17, with v as rows); then group norm
    of S r, plus the bonus (r · (ρ ⊙ k̃)ᵀ) v, times g, projected.

    The values are the layer's own: the published mix with the first layer's values is not part of the mixer.
    The paper has one direction; in two, each owns all but the output projection.
    """
    return affine(directions(mixer, (x,), causal, partial(_run, config)), mixer.out_proj)


def _low_rank(x: Tensor, layer: Any, act=lambda x: x) -> Tensor:
    """lora(x) = f(x A) B + λ."""
    y = act(x @ layer.down.weight.T) @ layer.up.weight.T
    return y if layer.bias is None else y + layer.bias


def _run(config: Any, branch: Any, x: Tensor) -> Tensor:
    h = config.heads
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mu for mu in branch.shift)
    r, k, v = affine(xr, branch.r_proj), affine(xk, branch.k_proj), affine(xv, branch.v_proj)
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(_low_rank(xw, branch.decay, torch.tanh)))
    a = torch.sigmoid(_low_rank(xa, branch.rate))
    g = _low_rank(xg, branch.gate, torch.sigmoid)
    kappa = unit(heads_of(k * branch.removal, h), 1e-12)
    k = k * (1 + (a - 1) * branch.replace)
    r, w, k, v, a = (heads_of(s, h) for s in (r, w, k, v, a))
    # 64e-5 for heads of 64 channels.
    eps = EPS * x.shape[-1] / h
    state, outputs = x.new_zeros(x.shape[0], h, v.shape[-1], k.shape[-1]), []
    for t in range(x.shape[1]):
        removed = (state * kappa[:, t, :, None]).sum(-1, keepdim=True) * (a * kappa)[:, t, :, None]
        state = state * w[:, t, :, None] - removed + v[:, t, :, :, None] * k[:, t, :, None]
        read = (state * r[:, t, :, None]).sum(-1)
        centred = read - read.mean(-1, keepdim=True)
        read = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        read = read * branch.norm.weight.view(h, -1) + branch.norm.bias.view(h, -1)
        outputs.append(read + (r * branch.bonus * k)[:, t].sum(-1, keepdim=True) * v[:, t])
    return torch.stack(outputs, 1).flatten(-2) * g
