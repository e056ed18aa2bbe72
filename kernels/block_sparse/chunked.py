"""Block-sparse attention, one block of keys at a time, each with all the queries that list it.

The keys of a block are read once for many queries, and gathering the queries costs their width only, where gathering
keys for each query would cost block_size times as much. Backward, the gradients of a block's keys are then one product
each, with nothing to be scattered. What a tile of queries gets from each of its blocks stands in a slot of its own,
with its own maximum; the slots of a tile are merged at the end (the split softmax of FlashAttention, arXiv 2205.14135).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..custom import custom_op
from .tables import Tables, distinct, tables

# Queries times heads in a tile: few, so that causality and padding hide little of one; enough for a matrix product.
TILE = 64
# Elements in the slots that are merged at once, and in the scores that exist at once: both are to stay in a cache.
SLOTS = 1 << 21
SCORES = 1 << 17
# Blocks are taken together where the shortest list of tiles is at least this share of the longest.
FILLED = 0.75


class _Sizes(NamedTuple):
    """Heads stand in lanes: groups that share both their lists and their keys."""

    block_size: int
    tile: int
    parts: int
    lanes: int
    heads: int
    causal: bool


class _Tiles(NamedTuple):
    """Some tiles: batch row and lane, queries (tiles, tile), which of these there are, their positions; empty slots."""

    batch: Tensor
    lane: Tensor
    query: Tensor
    real: Tensor
    position: Tensor
    unfilled: Tensor


class _Group(NamedTuple):
    """Some blocks of keys with their tiles.

    Args:
        unit: (n,) the block's number over batch, lanes and blocks.
        slot: (n, m) the slots of its tiles; the last slot for none.
        partial: whether the tiles may not see all keys of the blocks.
    """

    unit: Tensor
    slot: Tensor
    partial: bool


class _Call:
    """The tensors of one call as the loop takes them."""

    def __init__(self, q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal):
        self.q, self.k, self.v = q, k.contiguous(), v.contiguous()
        self.batch, self.t, self.h, self.width = q.shape
        f, g = blocks.shape[2], k.shape[2]
        lanes = max(f, g)
        heads = self.h // lanes
        tile = min(query_block, max(TILE // heads, 1))
        self.sizes = _Sizes(block_size, tile, -(-query_block // tile), lanes, heads, causal)
        self.compute = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        self.compute = torch.promote_types(self.compute, v.dtype)
        self.tables: Tables = tables(
            self.t, k.shape[1], blocks.shape[1], block_size, query_block, cu_seqlens, q_positions, q.device
        )
        self.blocks = distinct(blocks)
        # Memory for the slots, kept: fresh memory costs more than what is done with it.
        self.room: Tensor | None = None
        self.count = self.tables.key_start.shape[0]
        self.tiles = blocks.shape[1] * self.sizes.parts

    def pieces(self, width: int) -> Iterator[tuple[_Tiles, int, list[_Group]]]:
        """The tiles some at a time, how many slots each has, and their groups; a slot holds `width` for each query."""
        each = self.blocks.shape[3] * self.sizes.tile * self.sizes.heads * width
        step = max(1, SLOTS // max(each, 1))
        total = self.batch * self.sizes.lanes * self.tiles
        for i in range(0, total, step):
            yield self._piece(torch.arange(i, min(i + step, total), device=self.q.device))

    def _piece(self, index: Tensor) -> tuple[_Tiles, int, list[_Group]]:
        sizes, tab = self.sizes, self.tables
        tile, lane = index % self.tiles, index // self.tiles % sizes.lanes
        batch, row = index // (self.tiles * sizes.lanes), tile // sizes.parts
        query = (tab.start[row] + tile % sizes.parts * sizes.tile)[:, None] + torch.arange(
            sizes.tile, device=row.device
        )
        real = query < tab.stop[row][:, None]
        query = query.clamp(max=self.t - 1)
        position = tab.positions.expand(self.batch, -1)[batch[:, None], query]
        lists = self.blocks.shape[2]
        listed = self.blocks.expand(self.batch, -1, -1, -1)[batch, row, lane * lists // sizes.lanes]
        there = (listed >= 0) & (listed < tab.count[row][:, None])
        number = (listed + tab.first[row][:, None]).clamp(0, self.count - 1)
        begin = listed * sizes.block_size
        if sizes.causal:
            last = position.masked_fill(~real, -1).amax(1, keepdim=True)
            there &= begin <= last
        # How many slots a tile needs; lists are often filled up with none.
        used = there.any(0).nonzero()
        slots = int(used[-1]) + 1 if used.numel() else 0
        there, number, begin = there[:, :slots], number[:, :slots], begin[:, :slots]
        hidden = tab.key_stop[number] - tab.key_start[number] < sizes.block_size
        if sizes.causal:
            least = position.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            hidden |= begin + sizes.block_size - 1 > least
        unit = (batch * sizes.lanes + lane)[:, None] * self.count + number
        tiles = _Tiles(batch, lane, query, real, position, (~there).flatten().nonzero()[:, 0])
        return tiles, slots, self._groups(there, unit, hidden)

    def _groups(self, there: Tensor, unit: Tensor, hidden: Tensor) -> list[_Group]:
        """Blocks with about as many tiles each, those that are wholly visible apart from the others."""
        kinds = self.batch * self.sizes.lanes * self.count
        slots = there.flatten().nonzero()[:, 0]
        if not len(slots):
            return []
        key, order = (unit + hidden * kinds).flatten()[slots].sort(stable=True)
        slots = torch.cat([slots[order], slots.new_tensor([there.numel()])])
        key, counts = key.unique_consecutive(return_counts=True)
        first = counts.cumsum(0) - counts
        partial = key >= kinds
        # Within a kind from many tiles to few.
        by_size = (partial * (counts.max() + 1) + counts).sort(descending=True, stable=True).indices
        key, counts, first = key[by_size], counts[by_size], first[by_size]
        groups = []
        for i, j, m, is_partial in self._ranges(counts.tolist(), int(partial.sum())):
            column = torch.arange(m, device=slots.device)
            at = torch.where(column < counts[i:j, None], first[i:j, None] + column, len(slots) - 1)
            groups.append(_Group(key[i:j] % kinds, slots[at], is_partial))
        return groups

    def _ranges(self, counts: list[int], partial: int) -> list[tuple[int, int, int, bool]]:
        rows = self.sizes.tile * self.sizes.heads * self.sizes.block_size
        ranges, i = [], 0
        while i < len(counts):
            most, is_partial = counts[i], i < partial
            end = partial if is_partial else len(counts)
            end = min(end, i + max(1, SCORES // (most * rows)))
            j = i + 1
            while j < end and counts[j] >= FILLED * most:
                j += 1
            ranges.append((i, j, most, is_partial))
            i = j
        return ranges

    def slots(self, count: int, width: int, tiles: _Tiles) -> Tensor:
        """Space for each slot, (count, width), with zeros in those that no group fills."""
        room = self.room
        if room is None or room.numel() < count * width:
            room = self.room = self.q.new_empty(count * width, dtype=self.compute)
        found = room[: count * width].view(count, width)
        return found.index_fill_(0, tiles.unfilled, 0)

    def gathered(self, x: Tensor, tiles: _Tiles) -> Tensor:
        """The rows of x (b, t, h, d) for each tile, (tiles + 1, tile · heads · d); after them a tile of zeros."""
        lanes = x.unflatten(2, (self.sizes.lanes, self.sizes.heads))
        rows = lanes[tiles.batch[:, None], tiles.query, tiles.lane[:, None]].flatten(1)
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).to(self.compute)

    def scatter(self, into: Tensor, rows: Tensor, tiles: _Tiles) -> None:
        """The inverse of `gathered`, without the last tile; `into` is (b, t, h, d)."""
        sizes = self.sizes
        rows = rows.unflatten(1, (sizes.tile, sizes.heads)).to(into.dtype)
        batch, lane = (x[:, None].expand_as(tiles.query)[tiles.real] for x in (tiles.batch, tiles.lane))
        into.unflatten(2, (sizes.lanes, sizes.heads))[batch, tiles.query[tiles.real], lane] = rows[tiles.real]

    def rows(self, unit: Tensor) -> Tensor:
        """Where the blocks' keys stand in k and v, (n, block_size); keys that do not exist repeat the last one."""
        lane, block = unit // self.count, unit % self.count
        (_, s, heads, _), lanes = self.k.shape, self.sizes.lanes
        row = self.tables.key_start[block][:, None] + torch.arange(self.sizes.block_size, device=unit.device)
        return ((lane // lanes * s)[:, None] + row.clamp(max=s - 1)) * heads + (lane % lanes * heads // lanes)[:, None]

    def blocks_of(self, x: Tensor, rows: Tensor) -> Tensor:
        """The blocks of k or v, (n, block_size, d), at `rows`."""
        # Of two dimensions index_select copies rows, of more it copies elements.
        return x.view(-1, x.shape[3]).index_select(0, rows.flatten()).view(*rows.shape, -1).to(self.compute)

    def of_keys(self, grads: Tensor, x: Tensor) -> Tensor:
        """The gradient of k or v from those of the lanes' blocks."""
        sizes, tab = self.sizes, self.tables
        grads = grads.view(self.batch, sizes.lanes, -1, x.shape[3])
        key = torch.arange(x.shape[1], device=x.device)
        block = torch.searchsorted(tab.key_start, key, right=True) - 1
        found = grads[:, :, block * sizes.block_size + key - tab.key_start[block]]
        return found.unflatten(1, (x.shape[2], -1)).sum(2).transpose(1, 2).to(x.dtype).contiguous()

    def hide(self, scores: Tensor, group: _Group, tiles: _Tiles, slots: int) -> Tensor:
        """Scores (n, m · tile · heads, block_size), in place, with minus infinity for keys that are not seen."""
        sizes, tab = self.sizes, self.tables
        block = group.unit % self.count
        key = torch.arange(sizes.block_size, device=block.device)
        exists = tab.key_start[block][:, None] + key < tab.key_stop[block][:, None]
        seen = exists[:, None, None]  # (n, 1, 1, keys)
        if sizes.causal:
            tile = (group.slot // slots).clamp(max=len(tiles.batch) - 1)
            relative = tiles.position[tile] - tab.key_position[block][:, None, None]
            seen = seen & (key <= relative[..., None])
        n, m = group.slot.shape
        shape = (n, m, sizes.tile, sizes.heads, sizes.block_size)
        scores.view(shape).masked_fill_(~seen[:, :, :, None].expand(shape), -torch.inf)
        return scores

    def scores(self, queries: Tensor, keys: Tensor, group: _Group, tiles: _Tiles, slots: int) -> Tensor:
        """The scores (n, m · rows, block_size) of a group, minus infinity where nothing is seen."""
        found = torch.bmm(queries, keys.mT)
        return self.hide(found, group, tiles, slots) if group.partial else found


def _add(total: Tensor, rows: Tensor, found: Tensor) -> None:
    """Adds to distinct rows, in place; several times as fast as index_add_."""
    total.index_copy_(0, rows, total.index_select(0, rows).add_(found.flatten(1)))


@custom_op("omnimix::block_sparse_chunked")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cu_seqlens: Tensor | None, q_positions: Tensor | None,
    block_size: int, query_block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the logarithm of each softmax's denominator, (b, t, h); infinite where nothing is seen."""
    call = _Call(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal)
    rows, width = call.sizes.tile * call.sizes.heads, v.shape[3]
    out, lse = v.new_zeros(*q.shape[:3], width), q.new_full(q.shape[:3], torch.inf, dtype=call.compute)
    for tiles, slots, groups in call.pieces(width):
        if not groups:
            continue
        queries, n = call.gathered(q, tiles).mul_(scale), len(tiles.batch)
        values = call.slots(n * slots + 1, rows * width, tiles)
        total = queries.new_zeros(n * slots + 1, rows)
        largest = torch.full_like(total, -torch.inf)
        for group in groups:
            tile = (group.slot // slots).flatten()
            mine = queries.index_select(0, tile).view(len(group.unit), -1, q.shape[3])
            at_keys = call.rows(group.unit)
            weights = call.scores(mine, call.blocks_of(call.k, at_keys), group, tiles, slots)
            most = weights.amax(-1)
            if group.partial:
                # exp(-inf - -inf) would be NaN.
                most.clamp_(min=torch.finfo(most.dtype).min)
            weights.sub_(most[..., None]).exp_()
            at = group.slot.flatten()
            values.index_copy_(0, at, torch.bmm(weights, call.blocks_of(call.v, at_keys)).view(-1, rows * width))
            total.index_copy_(0, at, weights.sum(-1).view(-1, rows))
            largest.index_copy_(0, at, most.view(-1, rows))
        values, total, largest = (x[:-1].unflatten(0, (n, slots)) for x in (values, total, largest))
        most = largest.amax(1, keepdim=True)
        shares = (largest - most.clamp(min=torch.finfo(most.dtype).min)).exp_()
        whole = (total * shares).sum(1)
        empty = whole == 0
        shares = shares.div_(whole.masked_fill(empty, 1)[:, None])[..., None]
        merged = queries.new_zeros(n, rows, width)
        for i in range(slots):
            merged.addcmul_(values[:, i].view(n, rows, width), shares[:, i])
        call.scatter(out, merged, tiles)
        found = (whole.log() + most[:, 0]).masked_fill_(empty, torch.inf)
        call.scatter(lse[..., None], found[..., None], tiles)
    return out, lse


@_forward.register_fake
def _(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale):
    compute = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(compute, v.dtype))
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


@custom_op("omnimix::block_sparse_chunked_backward")
def _backward(
    do: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cu_seqlens: Tensor | None,
    q_positions: Tensor | None, block_size: int, query_block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    call = _Call(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal)
    rows, width = call.sizes.tile * call.sizes.heads, q.shape[3]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # What each lane gives to each block of keys.
    units = call.batch * call.sizes.lanes * call.count
    dk, dv = (x.new_zeros(units, block_size * x.shape[3], dtype=call.compute) for x in (k, v))
    dot = (do.to(call.compute) * out.to(call.compute)).sum(-1, keepdim=True)
    for tiles, slots, groups in call.pieces(width):
        if not groups:
            continue
        queries, douts = call.gathered(q, tiles).mul_(scale), call.gathered(do, tiles)
        dots, norms = call.gathered(dot, tiles), call.gathered(lse[..., None], tiles)
        # Of what is no query every weight is zero.
        norms[:-1].view(-1, call.sizes.tile, call.sizes.heads).masked_fill_(~tiles.real[..., None], torch.inf)
        norms[-1] = torch.inf
        grads = call.slots(len(tiles.batch) * slots + 1, rows * width, tiles)
        for group in groups:
            n, tile = len(group.unit), (group.slot // slots).flatten()
            mine = queries.index_select(0, tile).view(n, -1, width)
            dmine = douts.index_select(0, tile).view(n, -1, v.shape[3])
            at_keys = call.rows(group.unit)
            keys, of_values = (call.blocks_of(x, at_keys) for x in (call.k, call.v))
            weights = call.scores(mine, keys, group, tiles, slots)
            weights.sub_(norms[tile].view(n, -1, 1)).exp_()
            _add(dv, group.unit, torch.bmm(weights.mT, dmine))
            dscores = torch.bmm(dmine, of_values.mT)
            dscores.sub_(dots[tile].view(n, -1, 1)).mul_(weights)
            _add(dk, group.unit, torch.bmm(dscores.mT, mine))
            grads.index_copy_(0, group.slot.flatten(), torch.bmm(dscores, keys).view(-1, rows * width))
        merged = grads[:-1].view(-1, slots, rows, width).sum(1).mul_(scale)
        call.scatter(dq, merged, tiles)
    return dq, call.of_keys(dk, k), call.of_keys(dv, v)


@_backward.register_fake
def _(do, out, lse, q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block_size, ctx.query_block, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, do, dlse):
    options = (ctx.block_size, ctx.query_block, ctx.causal, ctx.scale)
    return *_backward(do.contiguous(), *ctx.saved_tensors, *options), *(None,) * 7


_forward.register_gradients(_differentiate, _save)


def block_sparse_chunked(
    *, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, query_block: int, causal: bool, scale: float,
    cu_seqlens: Tensor | None, q_positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `omnimix.kernels.block_sparse`."""
    return _forward(q, k, v, blocks, cu_seqlens, q_positions, block_size, query_block, causal, scale)[0]
