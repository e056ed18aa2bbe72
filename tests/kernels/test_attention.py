"""Attention: what the laws' short sequences do not reach, and what positions mean."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import results
from omnimix.errors import UnsupportedShape
from omnimix.kernels import attention

from ..laws import checker


def tensors(b=1, tq=150, tk=150, h=2, g=1, dk=3, dv=2):
    return {
        "q": torch.randn(b, tq, h, dk, dtype=torch.float64),
        "k": torch.randn(b, tk, g, dk, dtype=torch.float64),
        "v": torch.randn(b, tk, g, dv, dtype=torch.float64),
    }


def chunked(**arguments):
    return attention(**arguments, backend="chunked")


def reference(**arguments):
    return attention(**arguments, backend="reference")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 3), (65, 70), (66, 1), (66, 500)])
@pytest.mark.parametrize(("tq", "tk"), [(259, 259), (260, 330)])
def test_windows_block_by_block(causal, window, sinks, tq, tk):
    arguments = tensors(2, tq, tk) | {"causal": causal, "window": window, "sinks": sinks}
    checker.agrees(chunked, reference, arguments)


@pytest.mark.slow
def test_a_window_costs_no_square():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        chunked(**tensors(1, 2048, 2048), window=32)
    # The scores alone would take 2048² elements of 8 bytes.
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 2048**2


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"window": 7, "sinks": 2}, {"causal": False}])
@pytest.mark.parametrize("lengths", [[700, 1, 300], [257]], ids=str)
def test_long_packed_sequences(options, lengths):
    borders = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    checker.agrees(chunked, reference, tensors(1, total, total, 2, 1) | {"cu_seqlens": borders} | options)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "sinks": 2}])
def test_the_last_queries_of_a_cache(backend, options):
    whole = tensors(2, 11, 11)
    o = attention(**whole, **options, backend=backend)
    for last in (1, 3):
        part = attention(**(whole | {"q": whole["q"][:, -last:]}), **options, backend=backend)
        torch.testing.assert_close(part, o[:, -last:])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "sinks": 2}, {"causal": False, "window": 3}])
def test_positions_say_what_is_visible(backend, options):
    whole = tensors(1, 12, 12)
    o = attention(**whole, **options, backend=backend)
    # A ring buffer: the keys in any order, with empty slots that hold rubbish between them.
    order = torch.randperm(12)
    slots = {name: torch.cat([whole[name][:, order], 1e3 + whole[name][:, :3]], 1) for name in ("k", "v")}
    found = attention(
        whole["q"],
        **slots,
        **options,
        q_positions=torch.arange(12)[None],
        k_positions=torch.cat([order, torch.tensor([-1, -5, -1])])[None],
        backend=backend,
    )
    torch.testing.assert_close(found, o)


@pytest.mark.parametrize("call", [reference, chunked])
def test_queries_that_see_nothing_get_zeros(call):
    arguments = tensors(2, 3, 4) | {
        "q_positions": torch.tensor([[-1, 2, 3], [5, 6, -1]]),
        "k_positions": torch.tensor([[0, 1, 2, 3], [-1, -1, -1, -1]]),
    }
    found = results(call, arguments)
    blind = torch.tensor([[True, False, False], [True, True, True]])
    assert (found.outputs[0][blind] == 0).all()
    assert (found.gradients["q"][blind] == 0).all()
    assert (found.gradients["v"][1] == 0).all()
    assert all(x.isfinite().all() for x in found.named().values())
    checker.agrees(call, reference, arguments)


def test_positions_default_to_the_last_keys():
    arguments = tensors(1, 2, 4)
    slots = torch.tensor([[3, 4, 5, 6]])
    found = chunked(**arguments, k_positions=slots, window=2)
    wanted = chunked(**arguments, k_positions=slots, q_positions=slots[:, -2:], window=2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_long_windows_compile(without_shape_checks):
    checker.compiles(chunked, tensors(1, 200, 200) | {"window": 5, "sinks": 2})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 0}, "window"),
        ({"sinks": -1}, "sinks"),
        ({"k": torch.randn(1, 4, 3, 3), "v": torch.randn(1, 4, 3, 2)}, "k: its 3 heads"),
        ({"q": torch.randn(1, 9, 2, 3)}, "q_positions"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {n: x.float() for n, x in tensors(1, 2, 4).items()}
    with pytest.raises(UnsupportedShape, match=named):
        attention(**(arguments | change))


@pytest.mark.parametrize("options", [{}, {"window": 4, "sinks": 2}])
def test_one_step_of_grouped_heads(options):
    arguments = tensors(2, 1, 9, 4, 2) | options
    checker.agrees(chunked, reference, arguments)
