"""selective_scan: what it must equal, sizes beyond the laws' cases, and its errors."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import call_of
from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import Draw, linear_recurrence, native, selective_scan
from omnimix.kernels.registry import get_op

from ..laws import checker

BACKENDS = [b.name for b in get_op("selective_scan").backends if b.name != "native" or not native.machine_refusal()]
FAST = [name for name in BACKENDS if name in ("native", "chunked")]
REFERENCE = call_of(get_op("selective_scan"), "reference")


def draw(b, t, d, n, g, *, seed=0):
    made = Draw.seeded(seed)
    return {
        "x": made.normal(b, t, d),
        "delta": made.normal(b, t, d),
        "A": -made.uniform(0.5, n + 0.5, d, n),
        "B": made.normal(b, t, g, n),
        "C": made.normal(b, t, g, n),
        "D": made.normal(d),
        "z": made.normal(b, t, d),
        "delta_bias": made.normal(d),
        "delta_softplus": True,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_parameters_are_a_convolution(backend):
    """Mamba, eq. 3: y = x * K with K_t = Σ_n C_n exp(t Δ A_n) Δ B_n."""
    t, d, n, step = 20, 3, 2, 0.3
    made = draw(1, t, d, n, 1)
    b, c = made["B"][:, :1], made["C"][:, :1]
    y, _ = selective_scan(
        made["x"],
        torch.full((1, t, d), step, dtype=torch.float64),
        made["A"],
        b.expand(1, t, 1, n),
        c.expand(1, t, 1, n),
        backend=backend,
    )
    lags = torch.arange(t, dtype=torch.float64)
    decay = torch.exp(lags[:, None, None] * step * made["A"])
    kernel = torch.einsum("n,tdn,n->td", c[0, 0, 0], decay, b[0, 0, 0]) * step
    wanted = torch.stack([(kernel[: s + 1].flip(0) * made["x"][0, : s + 1]).sum(0) for s in range(t)])
    assert torch.allclose(y[0], wanted, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_state_a_channel_is_a_linear_recurrence(backend):
    made = draw(2, 9, 3, 1, 1)
    step = torch.nn.functional.softplus(made["delta"] + made["delta_bias"])
    h, state = linear_recurrence(step * made["B"][..., 0] * made["x"], torch.exp(step * made["A"][:, 0]))
    wanted = (made["C"][..., 0] * h + made["D"] * made["x"]) * torch.nn.functional.silu(made["z"])
    y, found = selective_scan(**made, backend=backend)
    assert torch.allclose(y, wanted, atol=1e-12)
    assert torch.allclose(found[..., 0], state, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("b", "t", "d", "n", "g"),
    # Mamba's 16 states, which have loops of their own; several blocks of channels; many rows; one row of many groups.
    [(1, 70, 37, 16, 1), (1, 40, 300, 64, 1), (5, 33, 40, 3, 2), (1, 6, 12, 2, 12)],
)
def test_sizes_of_many_blocks(backend, b, t, d, n, g):
    arguments = draw(b, t, d, n, g) | {"initial_state": Draw.seeded(1).normal(b, d, n)}
    checker.agrees(call_of(get_op("selective_scan"), backend), REFERENCE, arguments)


@pytest.mark.parametrize("backend", FAST)
def test_threads_change_nothing_that_matters(backend):
    arguments = draw(2, 40, 70, 16, 1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            y, state = selective_scan(**leaves, backend=backend)
            (y.sum() + state.sum()).backward()
            found.append([y, state, *(v.grad for v in leaves.values() if isinstance(v, torch.Tensor))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(one, two, rtol=1e-12, atol=1e-12) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_exact_over_the_whole_range(backend, dtype):
    """softplus, exp and silu are the kernels' own: from far below to far above zero."""
    d = 401
    values = torch.linspace(-100, 100, d, dtype=dtype).expand(1, 1, d)
    ones = torch.ones(1, 1, 1, 1, dtype=dtype)
    y, state = selective_scan(
        torch.ones(1, 1, d, dtype=dtype), values, -torch.ones(d, 1, dtype=dtype), ones, ones,
        z=values, delta_softplus=True, initial_state=torch.ones(1, d, 1, dtype=dtype), backend=backend,
    )  # fmt: skip
    step = torch.nn.functional.softplus(values.double())
    wanted = torch.exp(-step) + step
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert torch.allclose(state[0, :, 0].double(), wanted[0, 0], rtol=tolerance, atol=0)
    gated = wanted * torch.nn.functional.silu(values.double())
    assert torch.allclose(y.double(), gated, rtol=10 * tolerance, atol=1e-30)


@pytest.mark.parametrize("backend", FAST)
def test_what_is_not_a_number_stays_in_its_channel(backend):
    arguments = draw(1, 5, 20, 16, 1)
    arguments["x"][0, 2, 7] = float("nan")
    y, state = selective_scan(**arguments, backend=backend)
    assert y[0, 2:, 7].isnan().all() and state[0, 7].isnan().all()
    y[0, 2:, 7], state[0, 7] = 0, 0
    assert y.isfinite().all() and state.isfinite().all()


def test_triton_refuses_more_states_than_a_program_holds():
    with pytest.raises(BackendUnavailable, match="200 states a channel"):
        selective_scan(**draw(1, 2, 1, 200, 1), backend="triton")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"A": -torch.ones(3, 2)}, "A: shape"),
        ({"delta": torch.randn(2, 5, 3)}, "delta: shape"),
        ({"C": torch.randn(2, 5, 1, 3)}, "C: shape"),
        ({"B": torch.randn(2, 5, 3, 2), "C": torch.randn(2, 5, 3, 2)}, "B: its 3 groups must divide x's 4 channels"),
        ({"D": torch.randn(3)}, "D: shape"),
        ({"z": torch.randn(2, 5, 1)}, "z: shape"),
        ({"delta_bias": torch.randn(4, 1)}, "delta_bias: shape"),
        ({"initial_state": torch.randn(1, 4, 2)}, "initial_state: shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: packed sequences need batch 1"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    arguments = {
        "x": torch.randn(2, 5, 4),
        "delta": torch.rand(2, 5, 4),
        "A": -torch.ones(4, 2),
        "B": torch.randn(2, 5, 1, 2),
        "C": torch.randn(2, 5, 1, 2),
    }
    with pytest.raises(UnsupportedShape, match=named):
        selective_scan(**(arguments | change))
