"""long_conv: transforms in blocks, and its errors."""

from __future__ import annotations

import pytest
import torch

from omnimix.errors import UnsupportedShape
from omnimix.kernels import long_conv
from omnimix.kernels.check import error
from omnimix.kernels.long_conv import chunked
from omnimix.kernels.long_conv.chunked import transform_size

from ..laws import checker


def by_backend(name):
    return lambda **arguments: long_conv(**arguments, backend=name)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize(("groups", "block"), [(6, 256), (2, 256), (1, 1024)])
def test_blocks_of_rows_join_to_the_whole(monkeypatch, state, groups, block):
    monkeypatch.setattr(chunked, "BLOCK", block)
    arguments = {"u": torch.randn(3, 50, 6), "filters": torch.randn(groups, 40), "skip": torch.randn(6)}
    arguments |= {"initial_state": torch.randn(3, 6, 39)} if state else {}
    arguments = {name: x.double() for name, x in arguments.items()}
    checker.agrees(by_backend("chunked"), by_backend("reference"), arguments)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_an_impulse_answers_with_the_filter(backend):
    u, filters = torch.zeros(1, 100, 2), torch.randn(2, 70)
    u[:, 20] = 1
    y, _ = long_conv(u, filters, backend=backend)
    assert error(y[0, 20:90], filters.t()) < 1e-6
    assert y[0, :20].abs().max() < 1e-6 and y[0, 90:].abs().max() < 1e-6


def test_short_sequences_and_short_filters_see_nothing_of_the_future():
    for t, taps in ((8, 200), (200, 8)):
        u = torch.randn(1, t, 3, requires_grad=True)
        y, _ = long_conv(u, torch.randn(3, taps))
        (g,) = torch.autograd.grad(y[:, :4].sum(), u)
        assert g[:, 4:].abs().max() == 0


@pytest.mark.parametrize("least", [1, 2, 7, 127, 16385, 32767])
def test_transform_sizes_are_even_and_smooth(least):
    size = transform_size(least)
    assert size >= least and size % 2 == 0
    for p in (2, 3, 5):
        while size % p == 0:
            size //= p
    assert size == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"filters": torch.randn(4, 3)}, "filters"),
        ({"filters": torch.randn(3, 0)}, "no taps"),
        ({"u": torch.randn(2, 0, 6)}, "u: the sequence is empty"),
        ({"skip": torch.randn(3)}, "skip"),
        ({"initial_state": torch.randn(2, 6, 4)}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch 1"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {"u": torch.randn(2, 5, 6), "filters": torch.randn(3, 4)}
    with pytest.raises(UnsupportedShape, match=named):
        long_conv(**(arguments | change))
