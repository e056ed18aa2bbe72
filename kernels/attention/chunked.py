"""Softmax attention on torch's scaled_dot_product_attention; windows block by block, at a cost of T · window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.graphs import for_every_length
from .visible import Rule, positions, visible_keys

# In a block of a window's queries. Shorter ones meet fewer keys in vain, but are smaller products.
QUERIES = 128


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
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    out, (q, k, v) = v.dtype, (x.to(dtype) for x in (q, k, v))
    rule = Rule(causal=causal, window=window, sinks=sinks)
    if cu_seqlens is not None:
        from .packed import attention_packed

        # -1 is no window: an op's schema has no optional numbers that torch.compile keeps static.
        o = attention_packed(q, k, v, cu_seqlens, causal, -1 if window is None else window, sinks, scale)
    elif q_positions is not None or k_positions is not None:
        p, s = positions(q_positions, k_positions, q.shape[1], k.shape[1], q.device)
        o = _masked(q, k, v, visible_keys(p[:, None, :, None], s[:, None, None, :], rule), scale)
    else:
        o = aligned(q, k, v, rule, scale)
    return o.to(out)


def aligned(q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float) -> Tensor:
    """Attention where keys stand at 0 … tk-1 and the queries are the last of them. Shapes as in `attention`."""
    tq, tk = q.shape[1], k.shape[1]
    if rule.window is not None and (for_every_length() or rule.window < tk):
        reach = -(-max(rule.window - 1, 1) // 64) * 64
        # With fewer steps there is nothing to save; a graph that is exported serves any number of them.
        if not for_every_length() and tq > 2 * reach and tq <= tk:
            return _windowed(q, k, v, rule, rule.window, scale, min(reach, QUERIES))
    elif not rule.causal or tq == 1:
        return _sdpa(q, k, v, scale)
    elif tq == tk:
        return _sdpa(q, k, v, scale, causal=True)
    p, s = positions(None, None, tq, tk, q.device)
    return _masked(q, k, v, visible_keys(p[:, None, :, None], s[:, None, None, :], rule), scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    heads, groups, width = q.shape[2], k.shape[2], v.shape[3]
    if q.shape[1] == 1 and heads != groups and not causal:
        # One step of decoding: the heads that share keys are the queries, so that the keys are read once.
        shared = None if mask is None else mask.expand(-1, -1, heads // groups, -1)
        rows = q[:, 0].unflatten(1, (groups, -1)).transpose(1, 2)
        return _sdpa(rows, k, v, scale, shared).transpose(1, 2).flatten(1, 2)[:, None]
    if q.device.type == "cpu" and q.shape[3] != width:
        # The CPU's fused kernel wants one width, and without it every score is written to memory.
        extra = width - q.shape[3]
        q, k, v = (F.pad(x, (0, max(n, 0))) for x, n in ((q, extra), (k, extra), (v, -extra)))
    if q.device.type == "cuda" and heads != groups and (mask is not None or q.dtype == torch.float32):
        # The fused kernel that takes masks and float32 does not take grouped heads.
        k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
        groups = heads
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=bool(heads != groups)
    )
    return o.transpose(1, 2)[..., :width]


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention with a mask [b or 1, 1, tq, tk], in which some queries may see nothing."""
    sees = seen.any(-1, keepdim=True)
    o = _sdpa(q, k, v, scale, mask=seen | ~sees)
    return torch.where(sees.transpose(1, 2), o, 0)


def _windowed(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, scale: float, block: int) -> Tensor:
    """Blocks of queries become batch rows; each meets the sinks, its own keys and those that a window reaches around.

    All blocks share one mask but those at the ends of the sequence, where keys are missing or are sinks at the same
    time.
    """
    (b, tq), tk = q.shape[:2], k.shape[1]
    n, first, back = -(-tq // block), tk - tq, -(-(window - 1) // block) * block
    around = block + (back if rule.causal else 2 * back)
    sinks = min(rule.sinks, tk)
    q = F.pad(q, (0, 0, 0, 0, 0, n * block - tq)).unflatten(1, (n, block))
    # Keys from `back` before the first query on, to the end of the last block's reach.
    begin, length = first - back, (n - 1) * block + around
    k, v = (_reached(x, begin, length, block, around, sinks) for x in (k, v))
    start = max(0, -(-(sinks + back - first) // block))
    stop = n if rule.causal else max(start, (tk - first - back) // block)
    outputs = []
    for i, j in ((0, min(start, n)), (start, stop), (max(start, stop), n)):
        if i < j:
            shared = (i, j) == (start, stop)
            blocks = torch.arange(i, i + 1 if shared else j, device=q.device)
            seen = _block_mask(first + blocks * block, block, back, around, tk, sinks, rule)
            rows = (x[:, i:j].flatten(0, 1) for x in (q, k, v))
            mask = seen.expand(b * (j - i), -1, -1, -1) if shared else seen.repeat(b, 1, 1, 1)
            outputs.append(_sdpa(*rows, scale=scale, mask=mask).unflatten(0, (b, j - i)))
    return torch.cat(outputs, dim=1).flatten(1, 2)[:, :tq]


def _reached(x: Tensor, begin: int, length: int, block: int, around: int, sinks: int) -> Tensor:
    """The keys that each block of queries meets, [b, blocks, sinks + around, g, k].

    `begin`, which may be negative, and `length` say which keys the blocks reach; missing ones are zeros.
    """
    inside = x[:, max(begin, 0) :]
    before = max(-begin, 0)
    padded = F.pad(inside, (0, 0, 0, 0, before, length - before - inside.shape[1]))
    near = padded.unfold(1, around, block).movedim(-1, 2)
    if not sinks:
        return near
    return torch.cat([x[:, None, :sinks].expand(-1, near.shape[1], -1, -1, -1), near], dim=2)


def _block_mask(start: Tensor, block: int, back: int, around: int, tk: int, sinks: int, rule: Rule) -> Tensor:
    """What the queries of the blocks that begin at `start` see of the keys that they meet.

    [blocks, 1, block, sinks + around]
    """
    device, start = start.device, start[:, None, None]
    p = start + torch.arange(block, device=device)[:, None]
    near = start - back + torch.arange(around, device=device)
    # A sink in reach of the window is met twice, and counts among the sinks.
    of_near = visible_keys(p, near, rule) & (near >= sinks) & (near < tk)
    of_sinks = visible_keys(p, torch.arange(sinks, device=device), rule).expand(len(start), block, sinks)
    seen = torch.cat([of_sinks, of_near], dim=-1)
    # Queries after the end are cut off later; until then they must see something.
    return (seen | (p >= tk))[:, None]
