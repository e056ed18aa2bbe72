"""long_conv: transforms in blocks, sums of powers, and its errors."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import error
from omnimix.errors import UnsupportedShape
from omnimix.kernels import long_conv
from omnimix.kernels.long_conv import diagonal, transform
from omnimix.kernels.long_conv.transform import block_size

from ..laws import checker


def by_backend(name):
    return lambda **arguments: long_conv(**arguments, backend=name)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize(("groups", "taps", "largest"), [(6, 40, 8192), (2, 40, 16), (1, 40, 8), (6, 129, 64)])
def test_blocks_of_steps_and_rows_join_to_the_whole(monkeypatch, state, groups, taps, largest):
    monkeypatch.setattr(transform, "LARGEST", largest)
    monkeypatch.setattr(transform, "SMALLEST", 8)
    monkeypatch.setattr(transform, "TOGETHER", 256)
    arguments = {"u": torch.randn(3, 75, 6), "filters": torch.randn(groups, taps), "skip": torch.randn(6)}
    arguments |= {"initial_state": torch.randn(3, 6, taps - 1)} if state else {}
    arguments = {name: x.double() for name, x in arguments.items()}
    checker.agrees(by_backend("chunked"), by_backend("reference"), arguments)


@pytest.mark.parametrize("t", [1, 2, 50])
def test_sums_of_powers_are_what_they_say(t):
    log_a = -torch.rand(3, 4).double(), torch.randn(3, 4).double()
    c, u = (torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()), torch.randn(2, t, 3).double()
    powers = (torch.complex(*log_a)[..., None] * torch.arange(t)).exp()
    wanted = torch.einsum("bdn,dnt->bdt", torch.complex(*c), powers).real
    assert error(diagonal.geometric_sum(c, log_a, t), wanted) < 1e-12
    gathered = torch.complex(*diagonal.discounted_sum(u, log_a))
    assert error(gathered, torch.einsum("btd,dnt->bdn", u + 0j, powers)) < 1e-12


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


@pytest.mark.parametrize("least", [1, 2, 7, 127, 4097])
def test_blocks_have_smooth_sizes(least):
    size = block_size(least)
    assert size >= least
    for p in (2, 3, 5):
        while size % p == 0:
            size //= p
    assert size == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"filters": torch.randn(4, 3)}, "filters"),
        ({"filters": torch.randn(3, 0)}, "no taps"),
        ({"skip": torch.randn(3)}, "skip"),
        ({"initial_state": torch.randn(2, 6, 4)}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch 1"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {"u": torch.randn(2, 5, 6), "filters": torch.randn(3, 4)}
    with pytest.raises(UnsupportedShape, match=named):
        long_conv(**(arguments | change))
