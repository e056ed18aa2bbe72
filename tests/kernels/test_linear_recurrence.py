"""linear_recurrence: what it must equal, sizes beyond the laws' cases, and its errors."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import call_of
from omnimix.errors import UnsupportedShape
from omnimix.kernels import Draw, linear_recurrence, native
from omnimix.kernels.registry import get_op

from ..laws import checker

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from omnimix.kernels.common.triton_scan import scan  # noqa: E402

OP = get_op("linear_recurrence")
BACKENDS = [b.name for b in OP.backends if b.name != "native" or not native.machine_refusal()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_over_the_past(backend):
    """h_t = Σ_s a^(t-s) x_s, in complex numbers (LRU, eq. 2)."""
    draw = Draw.seeded()
    x, a = draw.complex_normal(2, 7, 3), torch.polar(draw.uniform(0.2, 1.0, 3), draw.uniform(-3.0, 3.0, 3))
    h, state = linear_recurrence(x, a, backend=backend)
    for t in range(7):
        powers = a ** torch.arange(t, -1, -1)[:, None]
        assert torch.allclose(h[:, t], (powers * x[:, : t + 1]).sum(1))
    assert torch.allclose(state, h[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_of_zero_and_minus_one_are_exact(backend):
    x = torch.ones(1, 4, 3)
    a = torch.tensor([[[1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, -1.0, 0.0], [1.0, -1.0, 1.0]]])
    h, _ = linear_recurrence(x, a, backend=backend)
    assert h[0].t().tolist() == [[1, 2, 3, 4], [1, 0, 1, 0], [1, 2, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_back_in_time_is_forwards_on_the_flipped_sequence(backend):
    draw = Draw.seeded()
    x, a, state = draw.normal(2, 40, 3), draw.uniform(-1.0, 1.0, 2, 40, 3), draw.normal(2, 3)
    h, final = linear_recurrence(x, a, reverse=True, initial_state=state, backend=backend)
    flipped, last = linear_recurrence(x.flip(1), a.flip(1), initial_state=state, backend="reference")
    assert torch.allclose(h, flipped.flip(1)) and torch.allclose(final, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugated_views(backend):
    draw = Draw.seeded()
    x, a, state = draw.complex_normal(2, 5, 3), draw.complex_normal(3), draw.complex_normal(2, 3)
    h, _ = linear_recurrence(x.conj(), a.conj(), initial_state=state.conj(), backend=backend)
    wanted, _ = linear_recurrence(x, a, initial_state=state, backend=backend)
    assert torch.allclose(h, wanted.conj())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("native", "chunked")])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_sizes_of_many_blocks(backend, kind):
    draw = Draw.seeded()
    normal = draw.normal if kind == "real" else draw.complex_normal
    arguments = {"x": normal(1, 350, 401), "a": normal(1, 350, 401, scale=0.3), "initial_state": normal(1, 401)}
    checker.agrees(call_of(OP, backend), call_of(OP, "reference"), arguments)


@triton.jit
def _scan_kernel(
    numbers, out, LOG: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr,
    STEPWISE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, 1 << LOG)[:, None]
    at = rows * BD + tl.arange(0, BD)[None, :]
    size: tl.constexpr = (1 << LOG) * BD
    ar = tl.load(numbers + at)
    ai = tl.load(numbers + size + at)
    ur = tl.load(numbers + 2 * size + at)
    ui = tl.load(numbers + 3 * size + at)
    row = rows + tl.zeros([1 << LOG, BD], dtype=tl.int32)
    ar, ai, ur, ui = scan(ar, ai, ur, ui, row, LOG, REVERSE, COMPLEX, STEPWISE)
    tl.store(out + at, ar)
    tl.store(out + size + at, ur)
    if COMPLEX:
        tl.store(out + 2 * size + at, ai)
        tl.store(out + 3 * size + at, ui)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("turning", [False, True])
def test_the_interpreters_scan_is_the_compiled_one(reverse, turning):
    """Other laws see only the stepwise form, so here both run."""
    numbers = Draw.seeded().normal(4, 8, 2)
    found = [torch.zeros(4, 8, 2, dtype=torch.float64) for _ in range(2)]
    for out, stepwise in zip(found, (True, False), strict=True):
        _scan_kernel[(1,)](numbers, out, LOG=3, BD=2, REVERSE=reverse, COMPLEX=turning, STEPWISE=stepwise)
    assert found[0].abs().sum() > 1
    assert torch.allclose(*found)


def test_the_laws_mirror():
    def sums_of_what_follows(*, x):
        return x.flip(1).cumsum(1).flip(1), x.sum(1)

    x = torch.randn(1, 4, 2)
    y, _ = checker.mirrored(sums_of_what_follows, ("x",))(x=x)
    assert torch.allclose(y, x.cumsum(1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": torch.rand(2, 5)}, "a: shape"),
        ({"a": torch.rand(3, dtype=torch.complex64)}, "a: torch.complex64 does not go with x's torch.float32"),
        ({"initial_state": torch.randn(3, 3)}, "initial_state: shape"),
        ({"initial_state": torch.randn(2, 3, dtype=torch.complex64)}, "initial_state: torch.complex64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: packed sequences need batch 1"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    with pytest.raises(UnsupportedShape, match=named):
        linear_recurrence(**({"x": torch.randn(2, 5, 3), "a": torch.rand(3)} | change))
