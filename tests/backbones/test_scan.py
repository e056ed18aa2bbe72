"""Scan orders are exact permutations, and go where they say."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from omnimix.backbones import Layout
from omnimix.backbones.scan import (
    ORDERS,
    SCANS,
    _grid_permutation,
    grid_permutation,
    needs_rows,
    permute,
    restore,
    scan_orders,
)
from omnimix.errors import ConfigError, UnknownName, UnsupportedCall

ALL = ["backward", *(f"{order}{end}" for order in ORDERS for end in ("", "-reverse") if order != "forward" or not end)]


def visited(order: str, t: int, h: int, w: int) -> list[int]:
    layout = Layout(causal=False, grid=(t, h, w))
    return permute(torch.arange(t * h * w)[None], order, layout)[0].tolist()


@pytest.mark.parametrize("order", ALL)
@pytest.mark.parametrize(
    ("grid", "extra"),
    [((1, 4, 4), ()), ((1, 3, 5), (7,)), ((2, 3, 4), (0, 25)), ((1, 1, 1), ()), ((3, 1, 2), (6,)), ((1, 5, 2), (0, 1))],
    ids=str,
)
def test_every_order_has_an_exact_inverse(order: str, grid: tuple[int, int, int], extra: tuple[int, ...]):
    layout = Layout(causal=False, grid=grid, extra=extra)
    x = torch.randn(2, layout.length, 3)
    y = permute(x, order, layout)
    assert torch.equal(restore(y, order, layout), x)
    assert torch.equal(y.sort(dim=1).values, x.sort(dim=1).values)
    if extra and not order.endswith("-reverse") and order != "backward":
        assert torch.equal(y[:, list(extra)], x[:, list(extra)])


def test_orders_visit_what_they_name():
    assert visited("columns", 1, 2, 3) == [0, 3, 1, 4, 2, 5]
    assert visited("snake", 1, 3, 3) == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert visited("snake", 2, 2, 2) == [0, 1, 3, 2, 6, 7, 5, 4]
    assert visited("snake-columns", 1, 2, 2) == [0, 2, 3, 1]
    assert visited("window", 1, 3, 4) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert visited("temporal", 2, 1, 2) == [0, 2, 1, 3]
    assert visited("temporal", 3, 1, 2) == [0, 2, 4, 1, 3, 5]
    assert visited("temporal-reverse", 3, 1, 2) == [5, 3, 1, 4, 2, 0]
    assert visited("backward", 1, 2, 2) == [3, 2, 1, 0]
    assert visited("columns-reverse", 1, 2, 2) == [3, 1, 2, 0]


@pytest.mark.parametrize(("order", "h", "w"), [("hilbert", 8, 8), ("hilbert", 16, 16), ("snake", 5, 7)])
def test_neighbours_in_the_order_are_neighbours_on_the_grid(order: str, h: int, w: int):
    cells = torch.tensor(visited(order, 1, h, w))
    rows, columns = cells // w, cells % w
    assert torch.equal(rows.diff().abs() + columns.diff().abs(), torch.ones(h * w - 1, dtype=torch.int64))


def test_packed_sequences_turn_round_where_they_stand():
    layout = Layout(causal=False, cu_seqlens=torch.tensor([0, 2, 5, 6]))
    x = torch.arange(6)[None]
    y = permute(x, "backward", layout)
    assert y[0].tolist() == [1, 0, 4, 3, 2, 5]
    assert torch.equal(restore(y, "backward", layout), x)
    with pytest.raises(UnsupportedCall, match="grid"):
        permute(x, "columns", layout)


def test_published_sets_are_made_of_known_orders():
    for name, orders in SCANS.items():
        assert scan_orders(name) == orders
        assert set(orders) <= {"forward", *ALL}
    assert scan_orders("forward, hilbert") == ("forward", "hilbert")


def test_the_3d_cross_scan_makes_neighbours_in_space_and_in_time():
    """In each of its directions every cell is next to its neighbour in the frame, or to itself a step of time away."""
    t, h, w = 3, 2, 4
    steps = {order: torch.tensor(visited(order, t, h, w)).diff().tolist() for order in scan_orders("cross-3d")}
    assert list(steps) == ["forward", "backward", "temporal", "temporal-reverse"]
    assert set(steps["forward"]) == {1} and set(steps["backward"]) == {-1}
    assert steps["temporal"].count(h * w) == (t - 1) * h * w
    assert steps["temporal-reverse"].count(-h * w) == (t - 1) * h * w


def test_tokens_without_rows_are_scanned_in_space_and_time_alone():
    layout = Layout(causal=False, grid=(2, 1, 3), extra=(0,), rows=False)
    x = torch.arange(7)[None]
    served = {order for order in ALL if not needs_rows(order)}
    assert served == {"forward", "backward", "temporal", "temporal-reverse"}
    assert set(scan_orders("cross-3d")) <= served
    assert permute(x, "temporal", layout)[0].tolist() == [0, 1, 4, 2, 5, 3, 6]
    for order in ALL:
        if order in served:
            assert torch.equal(restore(permute(x, order, layout), order, layout), x)
        else:
            with pytest.raises(UnsupportedCall, match="layout.rows is False"):
                permute(x, order, layout)


def test_mistakes_are_named():
    with pytest.raises(UnknownName, match="'cross"):
        scan_orders("crosss")
    with pytest.raises(UnknownName) as caught:
        scan_orders("foo")
    known = str(caught.value).partition("known: ")[2].split(", ")
    assert "hilbert" in known and len(known) == len(set(known))
    with pytest.raises(ConfigError, match="twice"):
        scan_orders("snake,snake")
    with pytest.raises(UnsupportedCall, match="grid"):
        permute(torch.zeros(1, 4), "snake", Layout(causal=False))


def test_the_permutation_is_made_once():
    first = grid_permutation("hilbert", (1, 8, 8), ())
    assert grid_permutation("hilbert", (1, 8, 8), ())[0] is first[0]


@pytest.mark.parametrize("order", ["snake", "hilbert", "window-reverse", "temporal"])
def test_what_is_kept_serves_whatever_came_first(order: str):
    """Permutations that were made in inference mode, or among the fake tensors of an export, are plain tensors."""
    grid = (2, 3, 5)
    layout = Layout(causal=False, grid=grid)
    for first in (torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True)):
        _grid_permutation.cache_clear()
        with first:
            permute(torch.zeros(1, 30, 2), order, layout)
        x = torch.randn(1, 30, 2, requires_grad=True)
        restore(permute(x, order, layout), order, layout).square().sum().backward()
        assert torch.equal(x.grad, 2 * x)
