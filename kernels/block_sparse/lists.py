"""Builders of block lists for `block_sparse`: fixed patterns, and blocks chosen by what the queries and keys hold.

All return int64 indices (b or 1, rows, f or 1, n), -1 for none, with rows of `query_block` queries. Fixed patterns are
for t queries at the positions 0 … t-1 and as many keys, and list a block where the pattern shows any of its keys to any
query of the row; `causal` then leaves out the blocks that lie wholly ahead, the kernel what lies ahead within a block.
What is chosen by content is chosen without a gradient, and equal scores are decided for the first block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ...utils.modes import own_precision
from ..common.graphs import for_every_length, for_other_runtimes
from .tables import distinct

Lists = Int[Tensor, "_ _ _ _"]

# Scores of queries with compressed keys that exist at once.
SCORES = 1 << 22


def _borders(t: int, block_size: int, query_block: int, device: torch.device | None) -> tuple[Tensor, Tensor, int]:
    """The first and the last query of each row, (rows,), and how many blocks of keys there are."""
    if t < 0 or min(block_size, query_block) < 1:
        raise UnsupportedShape(
            f"t, block_size, query_block: {t}, {block_size}, {query_block}; the first must not be negative, and the "
            "others at least 1"
        )
    first = torch.arange(0, t, query_block, device=device)
    return first, (first + query_block - 1).clamp(max=t - 1), -(-t // block_size)


def _listed(blocks: Tensor, lowest: Tensor | int, highest: Tensor | int) -> Lists:
    """Candidates (rows, n), those outside lowest … highest (each (rows,) or a number) struck out."""
    low, high = (x[:, None] if isinstance(x, Tensor) else x for x in (lowest, highest))
    return torch.where((blocks >= low) & (blocks <= high), blocks, -1)[None, :, None]


def window(
    t: int,
    *,
    block_size: int,
    query_block: int,
    window: int,
    causal: bool = True,
    device: torch.device | None = None,
) -> Lists:
    """The blocks with keys fewer than `window` positions away (Longformer, arXiv 2004.05150, section 3.1)."""
    first, last, count = _borders(t, block_size, query_block, device)
    low = (first - window + 1).clamp(min=0) // block_size
    high = (last if causal else (last + window - 1).clamp(max=t - 1)) // block_size
    # As many as the widest row can reach.
    most = min(count, (query_block + (1 if causal else 2) * (window - 1) + block_size - 2) // block_size + 1)
    return _listed(low[:, None] + torch.arange(most, device=device), low, high)


def sinks(
    t: int, *, block_size: int, query_block: int, sinks: int, causal: bool = True, device: torch.device | None = None
) -> Lists:
    """The blocks that hold the first `sinks` keys, for every row (StreamingLLM, arXiv 2309.17453)."""
    _, last, count = _borders(t, block_size, query_block, device)
    blocks = torch.arange(min(count, -(-sinks // block_size)), device=device).expand(len(last), -1)
    return _listed(blocks, 0, last // block_size if causal else count - 1)


def global_tokens(
    t: int,
    tokens: Int[Tensor, " m"],
    *,
    block_size: int,
    query_block: int,
    causal: bool = True,
) -> Lists:
    """Every row sees the blocks that hold global tokens, and a row that holds one sees every block (Longformer, arXiv
    2004.05150, section 3.1)."""
    first, last, count = _borders(t, block_size, query_block, tokens.device)
    holds = ((tokens >= first[:, None]) & (tokens <= last[:, None])).any(1, keepdim=True)
    blocks = torch.arange(count, device=tokens.device)
    wanted = holds | torch.isin(blocks, tokens // block_size)
    return _listed(torch.where(wanted, blocks, -1), 0, last // block_size if causal else count - 1)


def random(
    t: int,
    *,
    block_size: int,
    query_block: int,
    number: int,
    seed: int = 0,
    causal: bool = True,
    device: torch.device | None = None,
) -> Lists:
    """`number` distinct blocks at random for each row, all there are where these are fewer (BigBird, arXiv 2007.14062,
    section 2). A seed always gives the same lists, on every device."""
    _, last, count = _borders(t, block_size, query_block, device)
    ranks = torch.rand(len(last), count, generator=torch.Generator().manual_seed(seed)).to(last.device)
    blocks = torch.arange(count, device=device)
    highest = last // block_size if causal else torch.full_like(last, count - 1)
    ahead = blocks > highest[:, None]
    return _listed(ranks.masked_fill(ahead, 2).sort(dim=-1, stable=True).indices[:, : min(number, count)], 0, highest)


def dilated(
    t: int,
    *,
    block_size: int,
    query_block: int,
    segment: int,
    dilation: int,
    causal: bool = True,
    device: torch.device | None = None,
) -> Lists:
    """Of the row's segment of `segment` blocks, those whose distance to the row's own is a multiple of `dilation`
    (LongNet, arXiv 2307.02486, eq. 8, with blocks for tokens)."""
    first, last, count = _borders(t, block_size, query_block, device)
    own = torch.stack([first, last], 1) // block_size
    blocks = torch.arange(count, device=device)
    # A row wider than a block has several blocks of its own.
    most = int((own[:, 1] - own[:, 0]).max()) + 1 if t else 1
    mine = own[:, :1] + torch.arange(most, device=device)
    mine = torch.minimum(mine, own[:, 1:])[..., None]
    shown = ((blocks // segment == mine // segment) & ((blocks - mine) % dilation == 0)).any(1)
    return _listed(torch.where(shown, blocks, -1), 0, last // block_size if causal else count - 1)


def axial(
    grid: tuple[int, int, int],
    *,
    block_size: int,
    query_block: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> Lists:
    """The blocks with keys that differ from a query in one coordinate only, on a grid (t, h, w) in raster order (axial
    attention, arXiv 1912.12180)."""
    frames, height, width = grid
    t = frames * height * width
    _, last, count = _borders(t, block_size, query_block, device)
    token = torch.arange(t, device=device)[:, None]
    along = []
    for size, stride in ((frames, height * width), (height, width), (width, 1)):
        start = token - token // stride % size * stride
        along.append(start + torch.arange(size, device=device) * stride)
    blocks = torch.cat(along, 1) // block_size
    blocks = F.pad(blocks, (0, 0, 0, len(last) * query_block - t), value=-1).unflatten(0, (-1, query_block)).flatten(1)
    return union(_listed(blocks, 0, last // block_size if causal else count - 1))


def union(*lists: Lists) -> Lists:
    """What any of the lists names, each block once, in ascending order."""
    shape = torch.broadcast_shapes(*(x.shape[:3] for x in lists))
    merged = distinct(torch.cat([x.expand(*shape, -1) for x in lists], -1))
    # In ascending order again, with what names no block at the end.
    highest = torch.iinfo(torch.int64).max
    merged = merged.masked_fill(merged < 0, highest).sort(-1).values
    if merged.numel() and merged.device.type != "meta" and not torch.compiler.is_compiling():
        merged = merged[..., : max(1, int((merged < highest).sum(-1).max()))]
    return merged.masked_fill(merged == highest, -1)


def best(scores: Float[Tensor, "b rows f n_blocks"], number: int) -> Lists:
    """The `number` blocks with the highest scores; of equal ones the first, none where the score is minus infinity."""
    scores, found = scores.detach().clone(), []
    # Few passes are faster than a sort, and unlike topk `max` is sure to give the first of equals.
    for _ in range(min(number, scores.shape[-1])):
        highest, block = scores.max(-1, keepdim=True)
        found.append(block.masked_fill(highest == -torch.inf, -1))
        scores.scatter_(-1, block, -torch.inf)
    return torch.cat(found, -1) if found else scores.new_empty(*scores.shape[:3], 0, dtype=torch.int64)


def by_mean_key(
    q: Float[Tensor, "b t h k"],
    means: Float[Tensor, "b m g k"],
    positions: Int[Tensor, "b t"],
    *,
    block_size: int,
    number: int,
    causal: bool = True,
    counts: Int[Tensor, " b"] | None = None,
) -> Lists:
    """A list for each query and head: its own block, and those whose mean key has the highest product with the query
    (MoBA, arXiv 2502.13189, eq. 5 to 7).

    Args:
        q: queries.
        means: the mean key of each block.
        positions: of the queries; negative for none, which is given no block.
        block_size: keys in a block.
        number: blocks a query, its own included.
        causal: whether only earlier blocks are chosen from.
        counts: the number of blocks in each row of the batch; m by default.
    """
    if for_every_length() and not for_other_runtimes():
        from . import exported

        return exported.by_mean_key(q.detach(), means.detach(), positions, counts, block_size, number, causal)
    own = positions[..., None, None] // block_size
    block = torch.arange(means.shape[1], device=q.device)
    there = None if counts is None else block < counts[:, None, None, None]
    parts = []
    for some, mine in zip(*(x.split(_step(q, means), dim=1) for x in (q, own)), strict=True):
        scores = _scores(some, means)
        hidden = block >= mine if causal else block == mine
        scores.masked_fill_((hidden if there is None else hidden | ~there)[:, None], -torch.inf)
        parts.append(best(scores.flatten(0, 1), number - 1).unflatten(0, scores.shape[:2]))
    # (b, g, t, r, n), with the heads in order again.
    chosen = torch.cat(parts, 2).transpose(1, 2).flatten(2, 3)
    listed = torch.cat([own.expand(*chosen.shape[:3], 1), chosen], -1)
    return torch.where(positions[..., None, None] < 0, -1, listed)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """The products (b, g, t, r, m) of queries (b, t, g · r, k) with keys (b, m, g, k), in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.detach().to(wide).unflatten(2, (keys.shape[2], -1)).transpose(1, 2)
    with own_precision(q.device.type):
        found = rows.flatten(2, 3) @ keys.detach().to(wide).permute(0, 2, 3, 1)
    return found.unflatten(2, rows.shape[2:4])


def _step(q: Tensor, keys: Tensor) -> int:
    """Queries whose scores with all keys exist at once."""
    return max(1, SCORES // max(1, q.shape[0] * q.shape[2] * keys.shape[1]))


def by_compressed_attention(
    q: Float[Tensor, "b t h k"],
    keys: Float[Tensor, "b m g k"],
    positions: Int[Tensor, "b t"],
    *,
    size: int,
    stride: int,
    block_size: int,
    number: int,
    blocks: int,
    first: int = 1,
    local: int = 2,
    causal: bool = True,
    scale: float | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Lists:
    """A list for each query and key-value head: the blocks that hold what its compressed attention looks at (NSA, arXiv
    2502.11089, eq. 8 to 12).

    Args:
        q: queries; those of a key-value head choose together.
        keys: compressed keys, number i for the `size` keys from i · stride on.
        positions: of the queries; negative for none, which is given no block.
        size, stride: of the compression, multiples of the stride.
        block_size: keys in a selected block, a multiple of the stride.
        number: blocks a query, with the first and local ones.
        blocks: how many blocks of keys there are.
        first, local: blocks that are always chosen: the first ones, and the query's own with those before it.
        causal: whether only blocks up to the query's own, and compressed keys of what lies wholly up to it, are seen.
        scale: factor on the scores; k ** -0.5 by default.
        lengths: of the keys of each row of the batch, where not all are there.

    Raises:
        UnsupportedShape: `size` or `block_size` is no multiple of `stride`.
    """
    if size % stride or block_size % stride:
        raise UnsupportedShape(f"size {size} and block_size {block_size} must be multiples of the stride {stride}")
    if for_every_length() and not for_other_runtimes():
        from . import exported

        sizes = (size, stride, block_size, number, blocks, first, local)
        return exported.by_compressed_attention(q.detach(), keys.detach(), positions, lengths, *sizes, causal, scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    ends = torch.arange(keys.shape[1], device=q.device) * stride + size
    full = None if lengths is None else torch.arange(blocks, device=q.device) * block_size < lengths[:, None]
    parts = []
    for some, place in zip(*(x.split(_step(q, keys), dim=1) for x in (q, positions)), strict=True):
        # What is seen ends before the query does, or with the sequence.
        stop = place + 1 if causal else torch.full_like(place, 1 << 60) if lengths is None else lengths[:, None]
        near = _visible(stop, ends)
        hidden = (ends[:near] > stop[..., None])[:, None, :, None]
        weights = _scores(some, keys[:, :near]).mul_(factor).masked_fill_(hidden, -1e30).softmax(-1).sum(3)
        importance = _of_blocks(weights, size // stride, block_size // stride, blocks)
        # Where nothing is seen the softmax has weighted what is hidden.
        importance = importance.masked_fill_((stop < size)[:, None, :, None], 0)
        fixed = _with_fixed(importance, place, full, block_size, (first, local), causal)
        parts.append(best(fixed, number))
    return torch.cat(parts, 2).transpose(1, 2).masked_fill(positions[..., None, None] < 0, -1)


def _visible(stop: Tensor, ends: Tensor) -> int:
    """How many of the compressed keys any query sees; all, where that is not to be known without waiting."""
    if torch.compiler.is_compiling() or stop.device.type != "cpu":
        return len(ends)
    return int((ends <= stop.max()).sum()) if stop.numel() else 0


def _of_blocks(weights: Tensor, overlap: int, pieces: int, blocks: int) -> Tensor:
    """Weights (..., m) of compressed keys, added up over the pieces of one stride that they share with each block."""
    total = blocks * pieces
    # Piece u is in the compressed keys u - overlap + 1 to u.
    padded = F.pad(weights, (overlap - 1, max(0, total - weights.shape[-1])))
    pieced = padded[..., :total]
    for i in range(1, overlap):
        pieced = pieced + padded[..., i : i + total]
    return pieced.unflatten(-1, (blocks, pieces)).sum(-1)


def _with_fixed(
    importance: Tensor, place: Tensor, full: Tensor | None, size: int, fixed: tuple[int, int], causal: bool
) -> Tensor:
    """The importance (b, g, t, blocks), infinite for what is always chosen and for what cannot be."""
    first, local = fixed
    block, own = torch.arange(importance.shape[-1], device=place.device), place[..., None] // size
    near = (block <= own) & (block > own - local)
    importance = importance.masked_fill((near | (block < first))[:, None], torch.inf)
    hidden = block > own if causal else torch.zeros_like(near)
    if full is not None:
        hidden = hidden | ~full[:, None]
    return importance.masked_fill(hidden[:, None], -torch.inf)


def vertical_slash(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t g k"],
    *,
    block_size: int,
    query_block: int,
    vertical: int,
    slash: int,
    last: int = 64,
    scale: float | None = None,
) -> Lists:
    """Lists by head that hold the columns and the diagonals on which the last queries look most (MInference, arXiv
    2407.02490, algorithm 2). For causal attention.

    Args:
        q, k: queries and keys of whole sequences.
        block_size, query_block: keys in a block, queries in a row.
        vertical, slash: how many columns and diagonals.
        last: how many queries the estimate stands on.
        scale: factor on the scores; k ** -0.5 by default.
    """
    (b, t, heads, width), groups = q.shape, k.shape[2]
    first, ends, _ = _borders(t, block_size, query_block, q.device)
    last, wide = min(last, t), torch.promote_types(q.dtype, torch.float32)
    some = q[:, t - last :].detach().to(wide).unflatten(2, (groups, -1))
    with own_precision(q.device.type):
        scores = torch.einsum("btgrk,bsgk->bgrts", some, k.detach().to(wide)).flatten(1, 2)
    place, key = torch.arange(t - last, t, device=q.device), torch.arange(t, device=q.device)
    behind = place[:, None] - key
    weights = (scores * (width**-0.5 if scale is None else scale)).masked_fill(behind < 0, -torch.inf).softmax(-1)
    columns = weights.sum(2).sort(dim=-1, descending=True, stable=True).indices[..., : min(vertical, t)]
    flat = behind.clamp(min=0).expand_as(weights).flatten(2)
    diagonals = weights.new_zeros(b, heads, t).scatter_add(2, flat, weights.flatten(2))
    diagonals = diagonals.sort(dim=-1, descending=True, stable=True).indices[..., : min(slash, t)]
    # On a diagonal a row of queries meets a run of keys, which ends in one block or in the next ones.
    spread = torch.arange((query_block + block_size - 2) // block_size + 1, device=q.device) * block_size
    low = first[:, None] - diagonals[:, :, None, :]
    high = ends[:, None] - diagonals[:, :, None, :]
    run = torch.minimum(low[..., None].clamp(min=0) + spread, high[..., None]).flatten(3)
    run = torch.where(run < 0, -1, run // block_size)
    upright = (columns // block_size)[:, :, None].expand(-1, -1, len(ends), -1)
    found = torch.cat([run, torch.where(upright <= (ends // block_size)[:, None], upright, -1)], -1)
    return union(found.transpose(1, 2))
