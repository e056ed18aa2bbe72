"""short_conv: long inputs in blocks, and its errors."""

from __future__ import annotations

import pytest
import torch

from omnimix.errors import UnknownName, UnsupportedShape
from omnimix.kernels import short_conv

from ..laws import checker


def tensors(b, t, d, width=4, state=0):
    made = {"x": torch.randn(b, t, d), "weight": torch.randn(d, width), "bias": torch.randn(d), "activation": "silu"}
    made |= {"initial_state": torch.randn(state, d, width - 1)} if state else {}
    return {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in made.items()}


def chunked(**arguments):
    return short_conv(**arguments, backend="chunked")


def by_conv1d(*, x, weight, bias, activation, initial_state):
    """What torch has for it, which is quick enough for inputs of several blocks."""
    rows = torch.cat([initial_state, x.transpose(1, 2)], dim=2)
    y = torch.nn.functional.conv1d(rows, weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return torch.nn.functional.silu(y), rows[:, :, rows.shape[2] - weight.shape[1] + 1 :]


@pytest.mark.parametrize(("b", "t", "d"), [(1, 600, 512), (2, 300, 512), (5, 100, 600), (1, 257, 512)])
def test_blocks_join_to_the_whole(b, t, d):
    checker.agrees(chunked, by_conv1d, tensors(b, t, d, state=b))


def test_a_filter_longer_than_a_block():
    checker.agrees(chunked, by_conv1d, tensors(1, 50, 9000, width=18, state=1))


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_short_sequence_keeps_some_of_its_state(backend):
    arguments = tensors(1, 2, 3, state=1)
    _, state = short_conv(**arguments, backend=backend)
    wanted = torch.cat([arguments["initial_state"][:, :, 2:], arguments["x"].transpose(1, 2)], dim=2)
    assert torch.equal(state, wanted)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_the_last_tap_meets_the_current_step(backend):
    x = torch.randn(1, 5, 2)
    y, _ = short_conv(x, torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), backend=backend)
    assert torch.equal(y[..., 0], x[..., 0])
    assert torch.equal(y[:, 1:, 1], x[:, :-1, 1])
    assert (y[:, 0, 1] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"weight": torch.randn(4, 3)}, UnsupportedShape, "weight"),
        ({"initial_state": torch.randn(2, 3, 4)}, UnsupportedShape, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 5])}, UnsupportedShape, "batch 1"),
        ({"activation": "sulu"}, UnknownName, "did you mean 'silu'"),
    ],
)
def test_bad_calls_name_the_argument(change, error, named, without_shape_checks):
    arguments = {"x": torch.randn(2, 5, 3), "weight": torch.randn(3, 4)}
    with pytest.raises(error, match=named):
        short_conv(**(arguments | change))
