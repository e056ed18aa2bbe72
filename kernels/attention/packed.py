"""Attention over packed sequences, each alone: a custom op, since their lengths are known only at run time."""

from itertools import pairwise

import torch
from torch import Tensor

from ..custom import custom_op
from .visible import Rule, visible_keys

# Queries whose scores the backward pass holds at once.
BLOCK = 256


def _rule(causal: bool, window: int, sinks: int) -> Rule:
    return Rule(causal=causal, window=None if window < 0 else window, sinks=sinks)


@custom_op("omnimix::attention_packed")
def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, sinks: int, scale: float
) -> Tensor:
    """`chunked.aligned` for each sequence; `window` is -1 for none."""
    from .chunked import aligned

    o = v.new_empty(*q.shape[:3], v.shape[3])
    edges = cu_seqlens.tolist()
    for a, e in pairwise(edges):
        if a < e:
            o[:, a:e] = aligned(q[:, a:e], k[:, a:e], v[:, a:e], _rule(causal, window, sinks), scale)
    return o


@attention_packed.register_fake
def _(q, k, v, cu_seqlens, causal, window, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


@custom_op("omnimix::attention_packed_backward")
def attention_packed_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. A block of queries meets all keys that it sees at once, so no statistics are kept."""
    rule = _rule(causal, window, sinks)
    groups = k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    # Heads that share keys stand together: [t, g, r, width].
    q, do = (x[0].to(compute).unflatten(1, (groups, -1)) for x in (q, do))
    keys, values = (x[0].to(compute).transpose(0, 1) for x in (k, v))
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    edges = cu_seqlens.tolist()
    for start, end in pairwise(edges):
        for a in range(start, end, BLOCK):
            e = min(a + BLOCK, end)
            p = torch.arange(a, e, device=q.device)
            parts = _parts(a - start, e - start, end - start, rule)
            s = torch.cat([torch.arange(start + i, start + j, device=q.device) for i, j in parts])
            spans = [slice(start + i, start + j) for i, j in parts]
            seen = visible_keys(p[:, None] - start, s - start, rule)
            near_k, near_v = (torch.cat([x[:, span] for span in spans], 1) for x in (keys, values))
            found = _block_backward(do[a:e], q[a:e], near_k, near_v, seen, scale)
            dq[a:e] = found[0]
            at = 0
            for span in spans:
                size = span.stop - span.start
                dk[:, span] += found[1][:, at : at + size]
                dv[:, span] += found[2][:, at : at + size]
                at += size
    dk, dv = (x.transpose(0, 1)[None].to(k.dtype).contiguous() for x in (dk, dv))
    return dq.flatten(1, 2)[None].to(k.dtype), dk, dv


def _parts(a: int, e: int, length: int, rule: Rule) -> list[tuple[int, int]]:
    """The ranges of keys that the queries a … e-1 of a sequence may see."""
    behind, ahead = (0, length) if rule.window is None else (max(0, a - rule.window + 1), e + rule.window - 1)
    sinks = min(rule.sinks, behind)
    near = (behind, e if rule.causal else min(ahead, length))
    return [(0, sinks), near] if sinks else [near]


def _block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of queries [n, g, r, k] against its keys [g, s, k]; every query sees at least itself."""
    n, _, r, _ = q.shape
    q, do = (x.permute(1, 2, 0, 3).flatten(1, 2) for x in (q, do))
    scores = (q @ k.mT).mul_(scale).unflatten(1, (r, n)).masked_fill_(~seen, -torch.inf).flatten(1, 2)
    weights = scores.softmax(-1)
    dv = weights.mT @ do
    dweights = do @ v.mT
    dscores = dweights.sub_((dweights * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    dq = (dscores @ k).unflatten(1, (r, n)).permute(2, 0, 1, 3)
    return dq, dscores.mT @ q, dv


@attention_packed_backward.register_fake
def _(do, q, k, v, cu_seqlens, causal, window, sinks, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.window, ctx.sinks, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    gradients = attention_packed_backward(
        do.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.window, ctx.sinks, ctx.scale
    )
    return *gradients, None, None, None, None, None


attention_packed.register_gradients(_backward, _save)
