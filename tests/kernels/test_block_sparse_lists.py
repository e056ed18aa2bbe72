"""Block lists: each pattern against the mask that its definition draws, query by key."""

from __future__ import annotations

import pytest
import torch

from omnimix.errors import UnsupportedShape
from omnimix.kernels import block_sparse
from omnimix.kernels.block_sparse import lists

T = 45
SIZES = pytest.mark.parametrize(("block_size", "query_block"), [(4, 4), (8, 3), (3, 7), (1, 1), (64, 64), (5, 1)])
DIRECTIONS = pytest.mark.parametrize("causal", [True, False])


def named(listed, count):
    """Which blocks each row names, (rows, count), of lists without batch and heads; none twice."""
    (row_lists,) = listed[:, :, 0]
    found = torch.zeros(len(row_lists), count, dtype=torch.bool)
    for row, blocks in enumerate(row_lists.tolist()):
        there = [i for i in blocks if i >= 0]
        assert len(set(there)) == len(there)
        found[row, there] = True
    return found


def blocks_of(mask, block_size, query_block):
    """The blocks of which a row of queries sees a key: (rows, count) from a mask (t, s)."""
    rows, count = -(-mask.shape[0] // query_block), -(-mask.shape[1] // block_size)
    padded = torch.zeros(rows * query_block, count * block_size, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.view(rows, query_block, count, block_size).any(3).any(1)


def agrees(listed, mask, block_size, query_block):
    wanted = blocks_of(mask, block_size, query_block)
    assert torch.equal(named(listed, wanted.shape[1]), wanted)


query, key = torch.arange(T)[:, None], torch.arange(T)


def ahead(block_size, query_block):
    """Keys of blocks that lie wholly ahead of a row."""
    last = (query // query_block * query_block + query_block - 1).clamp(max=T - 1)
    return key // block_size > last // block_size


@SIZES
@DIRECTIONS
@pytest.mark.parametrize("width", [1, 5, 6, 100])
def test_window(block_size, query_block, causal, width):
    listed = lists.window(T, block_size=block_size, query_block=query_block, window=width, causal=causal)
    mask = (query - key).abs() < width
    agrees(listed, mask & (key <= query) if causal else mask, block_size, query_block)


@SIZES
@DIRECTIONS
def test_sinks_and_global_tokens(block_size, query_block, causal):
    options = {"block_size": block_size, "query_block": query_block, "causal": causal}
    hidden = ahead(block_size, query_block) if causal else torch.zeros(T, T, dtype=torch.bool)
    agrees(lists.sinks(T, sinks=6, **options), (key < 6) & (query >= 0) & ~hidden, block_size, query_block)
    some = torch.tensor([3, 17, 18])
    mask = torch.isin(query, some) | torch.isin(key, some)
    agrees(lists.global_tokens(T, some, **options), mask & ~hidden, block_size, query_block)


@SIZES
@DIRECTIONS
def test_random(block_size, query_block, causal):
    options = {"block_size": block_size, "query_block": query_block, "causal": causal, "number": 3}
    count = -(-T // block_size)
    found = named(lists.random(T, **options), count)
    hidden = ahead(block_size, query_block) if causal else torch.zeros(T, T, dtype=torch.bool)
    shown = blocks_of(~hidden, block_size, query_block)
    assert torch.equal(found.sum(1), shown.sum(1).clamp(max=3))
    assert not (found & ~shown).any()
    assert torch.equal(found, named(lists.random(T, **options), count))
    if count > 10:
        assert not torch.equal(found, named(lists.random(T, **options, seed=1), count))


@SIZES
@DIRECTIONS
def test_dilated(block_size, query_block, causal):
    listed = lists.dilated(T, block_size=block_size, query_block=query_block, segment=4, dilation=2, causal=causal)
    b, i = key // block_size, query // block_size
    mask = (b // 4 == i // 4) & ((b - i) % 2 == 0)
    agrees(listed, mask & ~ahead(block_size, query_block) if causal else mask, block_size, query_block)


@SIZES
def test_axial(block_size, query_block):
    frames, rows, columns = key // 15, key // 5 % 3, key % 5
    same = [x == x[:, None] for x in (frames, rows, columns)]
    mask = (same[0] & same[1]) | (same[0] & same[2]) | (same[1] & same[2])
    agrees(lists.axial((3, 3, 5), block_size=block_size, query_block=query_block), mask, block_size, query_block)


def test_union_names_each_block_once_in_order():
    some, more = torch.tensor([[[[3, -1, 0]]]]), torch.tensor([[[[0, 5]], [[-1, -1]]]])
    assert lists.union(some, more).tolist() == [[[[0, 3, 5]], [[0, 3, -1]]]]


def test_the_best_are_the_first_of_equals():
    scores = torch.tensor([[[[1.0, 2.0, 2.0, -torch.inf]]]])
    assert lists.best(scores, 2).tolist() == [[[[1, 2]]]]
    assert lists.best(scores, 4).tolist() == [[[[1, 2, 0, -1]]]]
    assert lists.best(torch.zeros(1, 1, 1, 9), 3).tolist() == [[[[0, 1, 2]]]]


@DIRECTIONS
def test_by_mean_key(causal, monkeypatch):
    monkeypatch.setattr(lists, "SCORES", 100)
    q, k = torch.randn(2, 20, 4, 3), torch.randn(2, 20, 2, 3)
    means = k.unflatten(1, (5, 4)).mean(2)
    positions = torch.arange(20).expand(2, -1).clone()
    positions[1, -2:] = -1
    listed = lists.by_mean_key(q, means, positions, block_size=4, number=3, causal=causal)
    for b in range(2):
        for t in range(20):
            for h in range(4):
                wanted = []
                if positions[b, t] >= 0:
                    scores = means[b, :, h // 2] @ q[b, t, h]
                    others = [j for j in range(5) if (j < t // 4 if causal else j != t // 4)]
                    wanted = sorted([t // 4, *sorted(others, key=lambda j: -scores[j])[:2]])
                assert sorted(i for i in listed[b, t, h].tolist() if i >= 0) == wanted


@pytest.mark.parametrize(("size", "stride", "block_size"), [(4, 2, 4), (4, 4, 8), (6, 2, 8), (4, 4, 4)])
def test_by_compressed_attention(size, stride, block_size, monkeypatch):
    monkeypatch.setattr(lists, "SCORES", 100)
    t, heads, groups = 26, 4, 2
    q, keys = torch.randn(1, t, heads, 3).double(), torch.randn(1, (t - size) // stride + 1, groups, 3).double()
    blocks = -(-t // block_size)
    listed = lists.by_compressed_attention(
        q,
        keys,
        torch.arange(t)[None],
        size=size,
        stride=stride,
        block_size=block_size,
        number=3,
        blocks=blocks,
        local=1,
    )
    for p in range(t):
        for g in range(groups):
            importance = torch.zeros(blocks).double()
            there = [i for i in range(keys.shape[1]) if i * stride + size <= p + 1]
            for h in range(2 * g, 2 * g + 2):
                weights = (
                    (torch.stack([keys[0, i, g] @ q[0, p, h] for i in there]) * 3**-0.5).softmax(0) if there else []
                )
                for i, w in zip(there, weights, strict=True):
                    # Each piece of one stride counts for the block that it lies in.
                    for piece in range(i * stride, i * stride + size, stride):
                        importance[piece // block_size] += w
            own = p // block_size
            importance[own] = importance[0] = torch.inf
            order = sorted(range(own + 1), key=lambda j: (-importance[j].item(), j))
            assert sorted(i for i in listed[0, p, g].tolist() if i >= 0) == sorted(order[:3])


def test_compression_must_fit_the_blocks():
    q, keys = torch.randn(1, 8, 1, 2), torch.randn(1, 2, 1, 2)
    with pytest.raises(UnsupportedShape, match="stride"):
        lists.by_compressed_attention(
            q, keys, torch.arange(8)[None], size=5, stride=4, block_size=4, number=1, blocks=2
        )


@pytest.mark.parametrize(("block_size", "query_block"), [(4, 4), (8, 3), (3, 7)])
def test_vertical_slash(block_size, query_block):
    q, k = torch.randn(1, T, 2, 3).double(), torch.randn(1, T, 1, 3).double()
    listed = lists.vertical_slash(
        q, k, block_size=block_size, query_block=query_block, vertical=2, slash=3, last=6, scale=1.0
    )
    for h in range(2):
        scores = (q[0, -6:, h] @ k[0, :, 0].T).masked_fill(key > query[-6:], -torch.inf).softmax(-1)
        columns = scores.sum(0).topk(2).indices
        diagonal = torch.zeros(T).double()
        for i in range(6):
            for j in range(T - 6 + i + 1):
                diagonal[T - 6 + i - j] += scores[i, j]
        mask = torch.isin(query - key, diagonal.topk(3).indices)
        mask |= torch.isin(key, columns) & ~ahead(block_size, query_block)
        agrees(listed[:, :, h : h + 1], mask, block_size, query_block)


def test_a_window_by_lists_is_the_window():
    from omnimix.kernels import attention

    q, k, v = (torch.randn(1, T, 2, 8) for _ in range(3))
    # Whole blocks: with blocks of one key the lists are the mask itself.
    listed = lists.window(T, block_size=1, query_block=1, window=7)
    found = block_sparse(q, k, v, listed, block_size=1)
    torch.testing.assert_close(found, attention(q, k, v, window=7))


def test_no_queries_have_no_lists():
    sizes = {"block_size": 4, "query_block": 3}
    made = [
        lists.window(0, window=5, **sizes),
        lists.sinks(0, sinks=3, **sizes),
        lists.random(0, number=2, **sizes),
        lists.dilated(0, segment=2, dilation=1, **sizes),
        lists.global_tokens(0, torch.tensor([0]), **sizes),
        lists.axial((0, 2, 2), **sizes),
        lists.vertical_slash(torch.randn(1, 0, 4, 8), torch.randn(1, 0, 2, 8), vertical=2, slash=2, **sizes),
    ]
    assert all(x.shape[1] == 0 for x in [*made, lists.union(*made[:2])])
    for batch, keys in ((2, 0), (2, 3), (0, 3)):
        q, means, places = torch.randn(batch, 0, 4, 8), torch.randn(batch, keys, 2, 8), torch.zeros(batch, 0).long()
        assert lists.by_mean_key(q, means, places, block_size=4, number=3).shape[:3] == (batch, 0, 4)
        options = {"size": 4, "stride": 2, "block_size": 4, "number": 3, "blocks": keys}
        assert lists.by_compressed_attention(q, means, places, **options).shape[:3] == (batch, 0, 2)
