"""Test-time training by its papers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import EPS, affine, directions, gelu, heads_of, rms_norm, rotate, silu


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    W_t = W_{t−1} − η_t ∇ℓ(W_{t'}; k_t, v_t) with W_{t'} those before the mini-batch of t, o_t = f(q_t; W_t) (TTT,
    arXiv 2407.04620, sections 2.1 and 2.4), f(x) = x + LN(f_res(x)) with f_res linear or an MLP of two
    layers with GELU, η = η_base σ(θ · x) (section 2.7). With momentum and forgetting (Titans, arXiv 2501.00663,
    section 3.1): S_t = η_t S_{t−1} − θ_t ∇ℓ, W_t = (1 − α_t) W_{t−1} + S_t. Norm by head, times silu(x W), projected.

    ℓ is ½ |f(k) − v|², where the paper has no ½. As in the published code, q and k have rotary positions that count
    within the mini-batch. Here they have unit length as well, and η is not divided by the head's size; α is
    1 − σ(·)^(1/16).
    """
    *qkv, gate = affine(x, mixer.in_proj).chunk(4, dim=-1)
    mixed = directions(mixer, (x, *qkv), causal, partial(_run, config))
    return affine(rms_norm(mixed, mixer.norm, config.heads) * silu(gate), mixer.out_proj)


def _run(config: Any, branch: Any, x: Tensor, *qkv: Tensor) -> Tensor:
    heads, default = config.heads, 1.0 if config.model == "linear" else 0.1
    q, k, v = (heads_of(s, heads) for s in qkv)
    if config.rotary:
        place = torch.arange(x.shape[1]) % config.chunk
        q, k = rotate(q, place, 10_000.0), rotate(k, place, 10_000.0)
    q, k = (s / s.pow(2).sum(-1, keepdim=True).sqrt() for s in (q, k))
    logits = list(affine(x, branch.gates).split(heads, dim=-1))
    lr = (config.base_lr or default) * torch.sigmoid(logits.pop(0))
    momentum = torch.sigmoid(logits.pop(0)) if config.momentum else torch.zeros_like(lr)
    keep = torch.sigmoid(logits.pop(0)) ** (1 / 16) if config.forget else torch.ones_like(lr)
    first = [w for w in (branch.w1, branch.b1, branch.w2, branch.b2) if w is not None]
    rows = [_train(config, branch, [s[i] for s in (q, k, v, lr, momentum, keep)], first) for i in range(x.shape[0])]
    return torch.stack(rows).flatten(-2)


def _train(config: Any, branch: Any, streams: list[Tensor], first: list[Tensor]) -> Tensor:
    """The outputs (t, h, d) of one sequence."""
    now, momentum, outputs = list(first), [torch.zeros_like(w) for w in first], []
    for t, (q, k, v, lr, hold, keep) in enumerate(zip(*streams, strict=True)):
        if t % config.chunk == 0:
            before = now
        # Autograd takes the inner gradient, of leaves that carry the graph of what made them.
        leaves = [w if w.requires_grad else w.detach().requires_grad_() for w in before]
        loss = (_f(branch, leaves, k) - v).pow(2).sum() / 2
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        momentum = [_by_head(hold, m) * m - _by_head(lr, g) * g for m, g in zip(momentum, gradients, strict=True)]
        now = [_by_head(keep, w) * w + m for w, m in zip(now, momentum, strict=True)]
        outputs.append(_f(branch, now, q))
    return torch.stack(outputs)


def _by_head(gate: Tensor, weights: Tensor) -> Tensor:
    return gate.view(-1, *[1] * (weights.ndim - 1))


def _f(branch: Any, weights: list[Tensor], x: Tensor) -> Tensor:
    """x + LN(f_res(x)), x (h, d)."""
    z = torch.einsum("hi,hio->ho", x, weights[0]) + weights[1]
    if len(weights) == 4:
        z = torch.einsum("hi,hio->ho", gelu(z), weights[2]) + weights[3]
    centred = z - z.mean(-1, keepdim=True)
    normal = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return x + normal * branch.norm_weight + branch.norm_bias
