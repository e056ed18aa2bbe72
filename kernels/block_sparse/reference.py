"""Block-sparse attention with every score written out."""

from __future__ import annotations

import torch
from torch import Tensor


def block_sparse_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    query_block: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    q_positions: Tensor | None,
) -> Tensor:
    """See `omnimix.kernels.block_sparse`."""
    if cu_seqlens is None:
        t, s = q.shape[1], k.shape[1]
        positions = torch.arange(s - t, s, device=q.device)[None] if q_positions is None else q_positions
        return _attend(q, k, v, blocks, positions, block_size, query_block, causal, scale)
    lengths = cu_seqlens.diff().tolist()
    rows = [-(-n // query_block) for n in lengths]
    sequences = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), blocks.split(rows, dim=1), strict=True)
    outputs = []
    for sequence in sequences:
        if n := sequence[0].shape[1]:
            positions = torch.arange(n, device=q.device)[None]
            own_q, own_k, own_v, own_blocks = sequence
            outputs.append(_attend(own_q, own_k, own_v, own_blocks, positions, block_size, query_block, causal, scale))
    return torch.cat(outputs, dim=1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    positions: Tensor,
    block_size: int,
    query_block: int,
    causal: bool,
    scale: float,
) -> Tensor:
    heads = q.shape[2]
    compute = torch.promote_types(torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype)), torch.float32)
    keys, values = (x.to(compute).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    seen = visible(blocks.expand(q.shape[0], -1, -1, -1), q.shape[1], k.shape[1], block_size, query_block)
    seen = seen.repeat_interleave(heads // blocks.shape[2], dim=2)
    if causal:
        seen = seen & (torch.arange(k.shape[1], device=q.device) <= positions[:, :, None, None])
    scores = torch.einsum("bthk,bshk->bths", q.to(compute), keys) * scale
    # exp(-inf) = 0 needs a finite maximum, which a query that sees nothing lacks.
    largest = scores.detach().masked_fill(~seen, torch.finfo(compute).min).amax(-1, keepdim=True)
    weights = torch.exp((scores - largest).masked_fill(~seen, -torch.inf))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return torch.einsum("bths,bshv->bthv", weights, values).to(v.dtype)


def visible(blocks: Tensor, t: int, s: int, block_size: int, query_block: int) -> Tensor:
    """Whether key j is in a block listed for query i: booleans (b, t, f, s) from lists (b, rows, f, n)."""
    count = -(-s // block_size)
    # The last column gathers what names no block.
    inside = torch.where((blocks < 0) | (blocks >= count), count, blocks).long()
    chosen = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=blocks.device).scatter(3, inside, True)
    row = torch.arange(t, device=blocks.device) // query_block
    block = torch.arange(s, device=blocks.device) // block_size
    return chosen[:, row][..., block]
