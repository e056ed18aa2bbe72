"""Softmax attention with every score written out."""

from __future__ import annotations

import torch
from torch import Tensor

from .visible import Rule, positions, visible_keys


def attention_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
    cu_seqlens: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
) -> Tensor:
    """See `omnimix.kernels.attention`."""
    rule = Rule(causal=causal, window=window, sinks=sinks)
    if cu_seqlens is None:
        return _attend(q, k, v, *positions(q_positions, k_positions, q.shape[1], k.shape[1], q.device), scale, rule)
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for own_q, own_k, own_v in zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True):
        if n := own_q.shape[1]:
            outputs.append(_attend(own_q, own_k, own_v, *positions(None, None, n, n, q.device), scale, rule))
    return torch.cat(outputs, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor, s: Tensor, scale: float, rule: Rule) -> Tensor:
    compute = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[2] // k.shape[2]
    keys, values = (x.to(compute).repeat_interleave(repeat, dim=2) for x in (k, v))
    seen = visible_keys(p[:, None, :, None], s[:, None, None, :], rule)
    scores = torch.einsum("bphk,bshk->bhps", q.to(compute), keys) * scale
    # exp(-inf) = 0 needs a finite maximum, which a query that sees nothing lacks.
    largest = scores.detach().masked_fill(~seen, torch.finfo(compute).min).amax(-1, keepdim=True)
    weights = torch.exp((scores - largest).masked_fill(~seen, -torch.inf))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return torch.einsum("bhps,bshv->bphv", weights, values).to(v.dtype)
