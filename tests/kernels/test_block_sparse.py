"""Block-sparse attention: what the laws do not reach, and what the arguments mean."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import results
from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import attention, block_sparse

from ..laws import checker

BACKENDS = pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])


def tensors(b=1, t=40, s=40, h=2, g=1, dk=3, dv=2):
    return {
        "q": torch.randn(b, t, h, dk, dtype=torch.float64),
        "k": torch.randn(b, s, g, dk, dtype=torch.float64),
        "v": torch.randn(b, s, g, dv, dtype=torch.float64),
    }


def call(backend):
    return lambda **arguments: block_sparse(**arguments, backend=backend)


def every(rows, count):
    return torch.arange(count).expand(1, rows, 1, -1)


def some(b, rows, f, n, count):
    return torch.randint(-1, count, (b, rows, f, n))


@BACKENDS
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_are_full_attention(backend, causal):
    arguments = tensors(2)
    sparse = call(backend)

    def listed(**tensors):
        return sparse(**tensors, blocks=every(4, 6), block_size=7, query_block=11, causal=causal)

    def full(**tensors):
        q, k, v = (x.transpose(1, 2) for x in tensors.values())
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return found.transpose(1, 2)

    checker.assert_equal(results(listed, arguments), results(full, arguments))


@BACKENDS
def test_a_block_counts_once_in_any_order(backend):
    arguments = tensors() | {"block_size": 4, "query_block": 40, "causal": False}
    once = call(backend)(**arguments, blocks=torch.tensor([[[[1, 7]]]]))
    again = call(backend)(**arguments, blocks=torch.tensor([[[[7, 1, -3, 7, 99, 1, -1]]]], dtype=torch.int32))
    torch.testing.assert_close(again, once)


@BACKENDS
def test_queries_that_see_nothing_get_zeros(backend):
    # The first row lists nothing, the second only what lies ahead.
    blocks = torch.tensor([-1, 3, 0]).view(1, 3, 1, 1)
    arguments = tensors(1, 12, 12) | {"blocks": blocks, "block_size": 4, "query_block": 5}
    found = results(call(backend), arguments)
    assert (found.outputs[0][:, :10] == 0).all() and (found.outputs[0][:, 10:] != 0).all()
    assert (found.gradients["q"][:, :10] == 0).all()
    assert all(x.isfinite().all() for x in found.named().values())


@BACKENDS
@pytest.mark.parametrize("last", [1, 6])
def test_the_last_queries_of_a_cache(backend, last):
    whole = tensors(1, 13, 13, 2, 1)
    lists = some(1, 13, 1, 3, 4)
    o = call(backend)(**whole, blocks=lists, block_size=4, query_block=1)
    part = whole | {"q": whole["q"][:, -last:]}
    found = call(backend)(**part, blocks=lists[:, -last:], block_size=4, query_block=1)
    torch.testing.assert_close(found, o[:, -last:])
    # The same queries before a cache with room, which holds rubbish.
    room = part | {n: torch.cat([part[n], 1e3 * torch.ones_like(part[n])], 1) for n in ("k", "v")}
    places = torch.arange(13 - last, 13)[None]
    found = call(backend)(**room, blocks=lists[:, -last:], block_size=4, query_block=1, q_positions=places)
    torch.testing.assert_close(found, o[:, -last:])


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_rows_of_queries(backend, causal):
    lengths, row = [5, 1, 16], 4
    blocks = some(1, sum(-(-n // row) for n in lengths), 2, 3, 6)
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    options = {"blocks": blocks, "block_size": 3, "query_block": row, "causal": causal, "cu_seqlens": borders}
    checker.agrees(call(backend), call("reference"), tensors(1, 22, 22) | options)


@pytest.mark.parametrize("causal", [True, False])
def test_many_rows_and_rows_too_long_for_a_tile(causal, monkeypatch):
    from importlib import import_module

    # As if the caches were tiny: pieces, groups and tiles of all sizes.
    chunked = import_module("omnimix.kernels.block_sparse.chunked")
    monkeypatch.setattr(chunked, "SLOTS", 1 << 9)
    monkeypatch.setattr(chunked, "SCORES", 1 << 8)
    monkeypatch.setattr(chunked, "TILE", 6)
    arguments = tensors(2, 70, 70, 4, 2) | {"blocks": some(2, 3, 4, 4, 10), "block_size": 7, "query_block": 30}
    checker.agrees(call("chunked"), call("reference"), arguments | {"causal": causal})


@pytest.mark.parametrize(("f", "g"), [(1, 4), (4, 1), (2, 4), (4, 2), (2, 2), (4, 4)])
def test_lists_by_groups_of_heads(f, g):
    arguments = tensors(2, 20, 20, 4, g) | {"blocks": some(2, 4, f, 3, 5), "block_size": 4, "query_block": 5}
    checker.agrees(call("chunked"), call("reference"), arguments)


@pytest.mark.triton
@pytest.mark.parametrize(("f", "g"), [(1, 2), (4, 2)])
def test_lists_by_groups_of_heads_in_triton(f, g):
    arguments = tensors(1, 9, 9, 4, g) | {"blocks": some(1, 2, f, 2, 3), "block_size": 4, "query_block": 5}
    checker.agrees(call("triton"), call("reference"), arguments)


def test_costs_no_square():
    arguments = tensors(1, 4096, 4096)
    blocks = torch.stack([torch.zeros(64, dtype=torch.int64), torch.arange(64)], -1).view(1, 64, 1, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results(call("chunked"), arguments | {"blocks": blocks, "block_size": 64})
    # One byte for each pair of positions would be more.
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4096**2 / 2


def test_one_key_block_is_attention_to_it():
    arguments = tensors(1, 8, 8)
    found = call("chunked")(**arguments, blocks=torch.ones(1, 1, 1, 1, dtype=torch.int64), block_size=4, query_block=8)
    wanted = attention(arguments["q"][:, 4:], arguments["k"][:, 4:], arguments["v"][:, 4:])
    torch.testing.assert_close(found[:, 4:], wanted)
    assert (found[:, :4] == 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 0}, "block_size"),
        ({"blocks": torch.zeros(1, 3, 1, 1, dtype=torch.int64)}, "blocks: 3 rows"),
        ({"blocks": torch.zeros(1, 2, 3, 1, dtype=torch.int64)}, "with f one of"),
        ({"blocks": torch.zeros(1, 2, 1, 1)}, "which takes int32, int64"),
        ({"q_positions": torch.zeros(1, 3, dtype=torch.int64)}, "q_positions"),
        ({"q": torch.randn(1, 9, 2, 3)}, "pass q_positions"),
        ({"k": torch.randn(1, 8, 3, 3), "v": torch.randn(1, 8, 3, 2)}, "k: its 3 heads"),
        ({"v": torch.randn(1, 7, 1, 2)}, "v: shape"),
        ({"cu_seqlens": torch.tensor([0, 3, 8]), "query_block": 3}, "need 3"),
        ({"cu_seqlens": torch.tensor([0, 8]), "k": torch.randn(1, 9, 1, 3), "v": torch.randn(1, 9, 1, 2)}, "t = s"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {n: x.float() for n, x in tensors(1, 8, 8).items()}
    arguments |= {"blocks": torch.zeros(1, 2, 1, 1, dtype=torch.int64), "block_size": 4}
    with pytest.raises(UnsupportedShape, match=named):
        block_sparse(**(arguments | change))


def test_triton_refuses_heads_wider_than_its_tiles():
    arguments = tensors(1, 4, 4, dk=300) | {"blocks": every(1, 1), "block_size": 4}
    with pytest.raises(BackendUnavailable, match="256"):
        call("triton")(**arguments)
