"""rotary, the op and the positions before it: what the laws do not say about them."""

from __future__ import annotations

import math

import pytest
import torch

from omnimix.backbones.rotary import RopeScaling, frequencies
from omnimix.backbones.rotary import rotary as by_position
from omnimix.errors import ConfigError, UnsupportedShape
from omnimix.kernels import rotary

BACKENDS = ["reference", "chunked", "triton"]


def given(k=8, r=3, t=9):
    return torch.randn(2, t, 3, k, dtype=torch.float64), torch.randn(2, t, r, dtype=torch.float64) * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_negative_angle_turns_back(backend, interleaved):
    x, angle = given()
    y = rotary(x, angle, interleaved=interleaved, backend=backend)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary(y, -angle, interleaved=interleaved, backend=backend), x)
    assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_are_where_they_are_said_to_be(backend):
    x = torch.arange(1.0, 7)[None, None, None]
    quarter = torch.tensor([[[math.pi / 2, 0.0, math.pi]]])
    halves = rotary(x, quarter, backend=backend).flatten()
    torch.testing.assert_close(halves, torch.tensor([-4.0, 2, -3, 1, 5, -6]))
    pairs = rotary(x, quarter, interleaved=True, backend=backend).flatten()
    torch.testing.assert_close(pairs, torch.tensor([-2.0, 1, 3, 4, -5, -6]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_of_x_without_a_gradient_of_the_angles(backend):
    x, angle = given()
    for asked in ("x", "angle"):
        leaf = {"x": x, "angle": angle}[asked].clone().requires_grad_()
        arguments = {"x": x, "angle": angle} | {asked: leaf}
        (found,) = torch.autograd.grad(rotary(**arguments, backend=backend).square().mul(x).sum(), leaf)
        (wanted,) = torch.autograd.grad(rotary(**arguments, backend="reference").square().mul(x).sum(), leaf)
        torch.testing.assert_close(found, wanted)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = torch.tensor([[3]])
    near = (by_position(q, at) * by_position(k, at + 5)).sum()
    far = (by_position(q, at + 1000) * by_position(k, at + 1005)).sum()
    torch.testing.assert_close(near, far)


def test_positions_are_exact_far_out_in_bfloat16():
    x = torch.randn(1, 1, 1, 8).bfloat16()
    exact = by_position(x.double(), torch.tensor([[100_003]]))
    assert (by_position(x, torch.tensor([[100_003]])) - exact).abs().max() < 0.03


def test_some_channels():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    positions = torch.arange(5)[None]
    y = by_position(x, positions, channels=4)
    torch.testing.assert_close(y, torch.cat([by_position(x[..., :4], positions), x[..., 4:]], dim=-1))


def test_scaled_frequencies_are_the_papers():
    plain = frequencies(16)
    torch.testing.assert_close(frequencies(16, scaling=RopeScaling(kind="linear", factor=4.0)), plain / 4)
    ntk = frequencies(16, scaling=RopeScaling(kind="ntk", factor=4.0)) / plain
    torch.testing.assert_close(ntk[[0, -1]], torch.tensor([1.0, 0.25]))
    assert (ntk.diff() < 0).all()
    # 2048 steps hold 326 turns of the fastest pair, and 0.06 of the slowest.
    yarn = frequencies(16, scaling=RopeScaling(kind="yarn", factor=4.0, trained=2048)) / plain
    torch.testing.assert_close(yarn[[0, -1]], torch.tensor([1.0, 0.25]))
    assert ((yarn > 0.25) & (yarn < 1)).any() and (yarn.diff() <= 0).all()
    torch.testing.assert_close(frequencies(16, scaling=RopeScaling(factor=1.0)), plain)


def test_yarn_sharpens_the_attention():
    x, positions = torch.randn(1, 3, 2, 8, dtype=torch.float64), torch.arange(3)[None]
    y = by_position(x, positions, scaling=RopeScaling(kind="yarn", factor=8.0))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1) * (0.1 * math.log(8) + 1))


@pytest.mark.parametrize(
    ("x", "angle", "named"),
    [
        (torch.ones(1, 4, 6), torch.ones(1, 4, 3), "x: shape"),
        (torch.ones(1, 4, 2, 6), torch.ones(1, 3, 3), "angle"),
        (torch.ones(1, 4, 2, 6), torch.ones(1, 4, 4), "4 pairs need more than x's 6 channels"),
        (torch.ones(1, 4, 2, 6), torch.ones(1, 4, 0), "nothing to turn"),
    ],
)
def test_bad_calls_name_the_argument(x, angle, named, without_shape_checks):
    with pytest.raises(UnsupportedShape, match=named):
        rotary(x, angle)


def test_bad_options_name_themselves(without_shape_checks):
    with pytest.raises(UnsupportedShape, match="channels: 9 of x's 8"):
        by_position(torch.ones(1, 2, 1, 8), torch.arange(2)[None], channels=9)
    with pytest.raises(ConfigError, match="kind is 'yarm'"):
        RopeScaling(kind="yarm")
    with pytest.raises(ConfigError, match=r"factor is 0\.5"):
        RopeScaling(factor=0.5)
