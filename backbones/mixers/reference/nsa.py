"""Native sparse attention by its paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .common import affine, attend, gelu, heads_of, rotate


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    Σ_c g_c Attn(q, K^c, V^c), c: compressed, selected, window (NSA, arXiv 2502.11089, eq. 5), g = σ(W x) by head.

    Compressed keys are φ(k_{id+1 … id+l}) (eq. 7), seen where their block lies wholly in the past. Their attention
    probabilities (eq. 8) are summed over the pieces that a block shares with them (eq. 9) and over the heads of a
    group (eq. 10), and the n highest blocks are selected (eq. 11, 12), the first and the last `local` ones always
    (section 4.1). Each branch has keys and values of its own (section 3.3.3).

    Left open by the paper: φ is the mean plus an MLP of the tokens with embeddings of their places; the compressed
    branch has no rotary positions, the others have. Bidirectional, which the paper does not have, nothing is hidden.
    """
    dim, heads, kv_heads = x.shape[-1], config.heads, config.kv_heads
    sizes = (dim, *[dim // heads * kv_heads] * 6, 3 * heads)
    q, *pairs, gates = affine(x, mixer.in_proj).split(sizes, dim=-1)
    q, (kc, vc, ks, vs, kw, vw) = heads_of(q, heads), (heads_of(s, kv_heads) for s in pairs)
    place = torch.arange(x.shape[1])
    turned, ks, kw = (rotate(s, place, config.rope_base) for s in (q, ks, kw))
    coarse, probabilities = _compressed(mixer, config, q, kc, vc, causal)
    past = place[:, None] >= place if causal else torch.ones(len(place), len(place), dtype=torch.bool)
    chosen = _selected(config, probabilities, len(place), causal)
    chosen = chosen.repeat_interleave(q.shape[2] // kc.shape[2], 1) & past
    near = ((place[:, None] - place).abs() < config.reach) & past
    gates = heads_of(torch.sigmoid(gates), q.shape[2])[..., None]
    branches = torch.stack((coarse, attend(turned, ks, vs, chosen), attend(turned, kw, vw, near)), 3)
    return affine((gates * branches).sum(3).flatten(-2), mixer.out_proj)


def _compressed(mixer: Any, config: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The compressed branch's output, and its attention probabilities (b, h, t, m)."""
    size, stride, t = config.size, config.stride, q.shape[1]
    starts = range(0, t - size + 1, stride)
    if not starts:
        return torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], t, 0)
    k, v = (_coarse(tokens, phi, size, starts) for tokens, phi in zip((k, v), mixer.compress, strict=True))
    ends = torch.tensor([s + size for s in starts])
    seen = ends <= torch.arange(t)[:, None] + 1 if causal else torch.ones(t, len(ends), dtype=torch.bool)
    # Values that name the compressed token: their attention is the probabilities.
    named = torch.eye(len(ends), dtype=q.dtype).expand(q.shape[0], k.shape[2], -1, -1).transpose(1, 2)
    return attend(q, k, v, seen), attend(q, k, named, seen).transpose(1, 2)


def _coarse(tokens: Tensor, phi: Any, size: int, starts: Iterable[int]) -> Tensor:
    blocks = torch.stack([tokens[:, s : s + size].transpose(1, 2) for s in starts], 1)
    mlp = affine(gelu(affine((blocks + phi.places).flatten(-2), phi.up)), phi.down)
    return blocks.mean(-2) + mlp


def _selected(config: Any, probabilities: Tensor, t: int, causal: bool) -> Tensor:
    """Which keys the selected blocks of each query and group hold, (b, g, t, t)."""
    b, h, _, m = probabilities.shape
    groups, size, stride = config.kv_heads, config.block_size, config.stride
    shown = torch.zeros(b, groups, t, t, dtype=torch.bool)
    of_group = probabilities.detach().reshape(b, groups, h // groups, t, m).sum(2)
    for row in range(b):
        for group in range(groups):
            for i in range(t):
                own, scores = i // size, {}
                for j in range(own + 1 if causal else -(-t // size)):
                    pieces = range(j * size // stride, (j + 1) * size // stride)
                    parts = [u - n for u in pieces for n in range(config.size // stride)]
                    scores[j] = sum(of_group[row, group, i, p].item() for p in parts if 0 <= p < m)
                    if j == 0 or own - config.local < j <= own:
                        scores[j] = float("inf")
                # Of equal ones the first.
                for j in sorted(scores, key=lambda j: -scores[j])[: config.blocks]:
                    shown[row, group, i, j * size : (j + 1) * size] = True
    return shown
