"""grouped_mm and its routing: what the laws do not say about them."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import results
from omnimix.errors import UnsupportedShape
from omnimix.kernels import grouped_mm
from omnimix.kernels.grouped_mm import combine, dispatch, route, scatter
from omnimix.kernels.grouped_mm.routing import _add_in_order, _add_sorted

from ..laws.checker import agrees, assert_equal, compiles, repeats

BACKENDS = ["reference", "chunked", "triton"]


def moe(chosen, experts, backend="reference"):
    """A layer of linear experts, of tokens, routing weights, and the experts' matrices."""

    def function(x, weight, matrices):
        to = route(chosen, experts)
        rows = grouped_mm(dispatch(x, to), matrices, to.counts, backend=backend)
        return combine(rows, weight, to)

    return function


def by_token(chosen, experts):
    """The same, token by token and choice by choice."""

    def function(x, weight, matrices):
        outputs = []
        for token, choices, weights in zip(x, chosen.tolist(), weight, strict=True):
            parts = [w * (token @ matrices[e]) for e, w in zip(choices, weights, strict=True) if e < experts]
            outputs.append(sum(parts) if parts else 0 * (weights.sum() * (token @ matrices[0])))
        return torch.stack(outputs)

    return function


def given(n, k, experts):
    return {
        "x": torch.randn(n, 5, dtype=torch.float64),
        "weight": torch.rand(n, k, dtype=torch.float64),
        "matrices": torch.randn(experts, 5, 7, dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k", "experts", "null"), [(9, 2, 4, 0), (1, 1, 3, 0), (17, 3, 5, 2)])
def test_routed_experts_are_each_token_alone(backend, n, k, experts, null):
    # With null experts: numbers from `experts` on stand for none.
    chosen = torch.stack([torch.randperm(experts + null)[:k] for _ in range(n)])
    agrees(moe(chosen, experts, backend), by_token(chosen, experts), given(n, k, experts))


def test_all_tokens_on_one_expert_and_none_at_all():
    for chosen in (torch.full((6, 1), 2), torch.full((6, 1), 3)):
        agrees(moe(chosen, 3, "chunked"), by_token(chosen, 3), given(6, 1, 3))


def test_routing_compiles_whole_and_repeats(without_shape_checks):
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    compiles(moe(chosen, 4, "chunked"), given(9, 2, 4))
    repeats(moe(chosen, 4, "chunked"), given(9, 2, 4))


def test_rows_of_an_expert_keep_the_order_of_their_tokens():
    to = route(torch.tensor([[1, 0], [0, 1], [1, 2]]), 3)
    assert to.order.tolist() == [1, 2, 0, 3, 4, 5]
    assert to.counts.tolist() == [2, 3, 1]
    assert to.order[to.place].tolist() == list(range(6))


def test_experts_choose_their_tokens():
    # Expert choice (arXiv 2202.09368): each expert takes its two best tokens, however often a token is taken.
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6], [0.1, 0.1, 0.5], [0.3, 0.2, 0.2]], dtype=torch.float64)
    taken = scores.t().topk(2, dim=1).indices

    def function(scores, x, matrices):
        token, expert = taken.flatten(), torch.arange(3).repeat_interleave(2)
        rows = grouped_mm(x[token], matrices, torch.tensor([2, 2, 2]), backend="chunked")
        return scatter(rows, scores[token, expert], token, 4)

    def token_by_token(scores, x, matrices):
        return torch.stack(
            [
                sum(scores[i, e] * (x[i] @ matrices[e]) for e in range(3) if i in taken[e].tolist()) + 0 * x[i].sum()
                for i in range(4)
            ]
        )

    arguments = {"scores": scores} | {n: v for n, v in given(4, 1, 3).items() if n != "weight"}
    agrees(function, token_by_token, arguments)
    repeats(function, arguments)


def test_scatter_adds_the_same_on_every_device():
    rows, token = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 9, (40,))
    token[token == 4] = 5
    assert torch.allclose(_add_in_order(rows, token, 9), _add_sorted(rows, token, 9), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(backend):
    x, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    y = grouped_mm(x, weight, torch.zeros(3, dtype=torch.int64), backend=backend)
    y.sum().backward()
    assert y.shape == (0, 7) and x.grad.shape == (0, 5) and weight.grad.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", ["x", "weight"])
def test_only_what_is_asked_for_is_differentiated(backend, asked):
    leaves = {"x": torch.randn(6, 5), "weight": torch.randn(2, 5, 7)}
    counts = torch.tensor([2, 4])
    leaves[asked].requires_grad_()
    found, wanted = (
        torch.autograd.grad(grouped_mm(**leaves, counts=counts, backend=b).square().sum(), leaves[asked])[0]
        for b in (backend, "reference")
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": torch.ones(2, 4, 3)}, "weight"),
        ({"weight": torch.ones(2, 5, 3, dtype=torch.float64)}, "weight: dtype"),
        ({"weight": torch.ones(0, 5, 3), "counts": torch.zeros(0, dtype=torch.int64)}, "empty"),
        ({"counts": torch.tensor([6])}, "one per expert"),
        ({"counts": torch.tensor([3, 4])}, "shares of 6 rows"),
        ({"counts": torch.tensor([-1, 4])}, "shares of 6 rows"),
        ({"counts": torch.tensor([2, 4], dtype=torch.int16)}, "int16"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {"x": torch.ones(6, 5), "weight": torch.ones(2, 5, 3), "counts": torch.tensor([2, 4])}
    with pytest.raises(UnsupportedShape, match=named):
        grouped_mm(**(arguments | change), backend="chunked")


@pytest.mark.parametrize(
    "call",
    [
        lambda to: combine(torch.ones(3, 2), torch.ones(2, 2), to),
        lambda to: scatter(torch.ones(3, 2), torch.ones(2), torch.zeros(3, dtype=torch.int64), 4),
    ],
)
def test_rows_and_weights_must_fit(call, without_shape_checks):
    with pytest.raises(UnsupportedShape, match="rows"):
        call(route(torch.zeros(2, 2, dtype=torch.int64), 2))


@pytest.mark.triton
def test_both_backends_of_a_layer_agree_where_everything_is_uneven():
    chosen = torch.randint(0, 40, (30, 4))
    arguments = given(30, 4, 33)
    assert_equal(
        results(moe(chosen, 33, "triton"), arguments, backward=False),
        results(moe(chosen, 33, "chunked"), arguments, backward=False),
    )
