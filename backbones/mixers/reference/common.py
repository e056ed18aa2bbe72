"""The pieces that several papers have in common, written out in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of every normalisation, where a backbone does not configure another.
EPS = 1e-5


def directions(mixer: Any, streams: Sequence[Tensor], causal: bool, run: Callable[..., Tensor]) -> Tensor:
    """The mean of `run(branch, *streams)` over the branches, of which a backward one runs from the last token on.

    Args:
        mixer: has `branches`, one for each order in `scan`.
        streams: what each branch is given, all (b, t, ...).
        causal: whether there is the forward branch only.
        run: one branch, from the first token to the last.
    """
    orders, outputs = ("forward",) if causal else mixer.scan, []
    for order, branch in zip(orders, mixer.branches, strict=True):
        turn = {"forward": lambda x: x, "backward": lambda x: x.flip(1)}[order]
        outputs.append(turn(run(branch, *(turn(s) for s in streams))))
    return torch.stack(outputs).mean(0)


def affine(x: Tensor, layer: Any) -> Tensor:
    """x Wᵀ + b, with the weights of a linear layer."""
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(b, t, d) as (b, t, heads, d / heads)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def rms_norm(x: Tensor, layer: Any, groups: int = 1) -> Tensor:
    """x / √(mean x² + EPS) · weight, the mean over each of `groups` equal slices of the channels (arXiv 1910.07467)."""
    slices = heads_of(x, groups)
    scale = (slices.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return (slices / scale).reshape(x.shape) * layer.weight


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = bias + Σ_j weight[:, w − 1 − j] ⊙ x_{t−j}, channel by channel; zeros stand before the first token."""
    taps, outputs = weight.shape[1], []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for j in range(min(taps, t + 1)):
            y = y + weight[:, taps - 1 - j] * x[:, t - j]
        outputs.append(y)
    return torch.stack(outputs, 1)


def silu(x: Tensor) -> Tensor:
    """x σ(x), also called swish."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ)"""
    return torch.logaddexp(x, torch.zeros_like(x))


def gelu(x: Tensor) -> Tensor:
    """x Φ(x) with the normal distribution's Φ (arXiv 1606.08415)."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(Σ x² + ε), over the last dimension."""
    return x / (x.pow(2).sum(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34): pair i of r is turned by position · base^(−i/r).

    Pairs are the channels i and i + r, as in GPT-NeoX and Llama; the paper's are neighbours.

    Args:
        x: (b, t, h, 2 r).
        positions: (t,).
        base: θ = base^(−i/r).
    """
    pairs = x.shape[-1] // 2
    theta = torch.tensor([base ** (-i / pairs) for i in range(pairs)], dtype=x.dtype)
    angle = (positions[:, None].to(x.dtype) * theta)[:, None]
    first, second = x[..., :pairs], x[..., pairs:]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over the keys that each query sees (arXiv 1706.03762, eq. 1); zeros where it sees none.

    Args:
        q: (b, t, h, d).
        k, v: (b, s, g, d); g divides h, and query head j reads head ⌊j g / h⌋ (arXiv 2305.13245).
        seen: (t, s), or (b, h, t, s).
    """
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
