"""Softmax attention by its papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import affine, attend, heads_of, rms_norm, rotate


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    softmax(q kᵀ / √d) v, under a mask of the earlier tokens (arXiv 1706.03762, section 3.2, eq. 1), with rotary
    positions (arXiv 2104.09864, eq. 34) and query heads that share keys and values (arXiv 2305.13245, section 2).

    Not of these papers: RMSNorm of queries and keys by head (`qk_norm`), and the gate σ(W x) on the output (`gate`).
    """
    q, k, v, gate = projected(mixer, config, x)
    place = torch.arange(x.shape[1])
    seen = place[:, None] >= place if causal else torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    return finished(mixer, config, attend(q, k, v, seen), gate)


def projected(mixer: Any, config: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v by heads, normalised and rotated as configured, and the gate's logits, which may have no channels."""
    dim, kv_heads = x.shape[-1], config.kv_heads or config.heads
    shared = dim // config.heads * kv_heads
    q, k, v, gate = affine(x, mixer.in_proj).split((dim, shared, shared, dim if config.gate else 0), dim=-1)
    q, k, v = heads_of(q, config.heads), heads_of(k, kv_heads), heads_of(v, kv_heads)
    if config.qk_norm:
        q, k = rms_norm(q, mixer.q_norm), rms_norm(k, mixer.k_norm)
    if config.rope:
        place = torch.arange(x.shape[1])
        q, k = rotate(q, place, config.rope_base), rotate(k, place, config.rope_base)
    return q, k, v, gate


def finished(mixer: Any, config: Any, o: Tensor, gate: Tensor) -> Tensor:
    """The heads concatenated, gated where configured, and projected."""
    o = o.flatten(-2)
    return affine(o * torch.sigmoid(gate) if config.gate else o, mixer.out_proj)
