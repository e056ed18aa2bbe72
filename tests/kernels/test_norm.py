"""norm: what the laws do not say about it."""

from __future__ import annotations

import pytest
import torch

from omnimix.errors import BackendUnavailable, UnknownName, UnsupportedShape
from omnimix.kernels import norm

from ..laws import checker

BACKENDS = ["reference", "chunked", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_any_leading_dimensions(backend, shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    wanted = torch.nn.functional.rms_norm(x, (5,), weight, 1e-5)
    torch.testing.assert_close(norm(x, weight, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_normalised_one_by_one(backend):
    x = torch.randn(4, 6, dtype=torch.float64)
    wanted = torch.cat([norm(part, backend="reference") for part in x.split(2, dim=-1)], dim=-1)
    torch.testing.assert_close(norm(x, groups=3, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_stay_zeros(backend):
    x = torch.zeros(2, 4, requires_grad=True)
    y = norm(x, backend=backend)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.triton
def test_more_rows_than_programs_of_the_backward_kernel(monkeypatch):
    from importlib import import_module

    monkeypatch.setattr(import_module("omnimix.kernels.norm.triton"), "PROGRAMS", 2)
    arguments = {"x": torch.randn(700, 9, dtype=torch.float64), "weight": torch.randn(9, dtype=torch.float64)}
    checker.agrees(
        lambda **a: norm(**a, groups=3, backend="triton"),
        lambda **a: norm(**a, groups=3, backend="reference"),
        arguments,
    )


@pytest.mark.triton
def test_slices_too_wide_for_triton_are_refused():
    with pytest.raises(BackendUnavailable, match="9000 channels"):
        norm(torch.randn(1, 9000), backend="triton")
    assert norm(torch.randn(1, 18000), groups=18, backend="triton").shape == (1, 18000)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"weight": torch.ones(5)}, UnsupportedShape, "weight"),
        ({"gate": torch.ones(2, 3)}, UnsupportedShape, "gate"),
        ({"groups": 4}, UnsupportedShape, "groups: 4 does not divide"),
        ({"gate_activation": "sigmoids"}, UnknownName, "sigmoid"),
        ({"x": torch.ones(2, 0)}, UnsupportedShape, "no channels to normalise"),
    ],
)
def test_bad_calls_name_the_argument(change, error, named, without_shape_checks):
    with pytest.raises(error, match=named):
        norm(**({"x": torch.ones(2, 6)} | change))
