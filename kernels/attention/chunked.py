"""Softmax attention on torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .visible import positions, visible_keys


def attention_chunked(
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
    rule = {"causal": causal, "window": window, "sinks": sinks}
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        sequences = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        return torch.cat(
            [
                _attend(*s, *positions(None, None, n, n, q.device), scale, rule)
                for n, s in zip(lengths, sequences, strict=True)
            ],
            dim=1,
        )
    return _attend(q, k, v, *positions(q_positions, k_positions, q.shape[1], k.shape[1], q.device), scale, rule)


def _attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor, s: Tensor, scale: float, rule: dict) -> Tensor:
    seen = visible_keys(p[:, None, :, None], s[:, None, None, :], **rule)
    sees = seen.any(-1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~sees, scale=scale, enable_gqa=True)
    return torch.where(sees, o, 0).transpose(1, 2)
