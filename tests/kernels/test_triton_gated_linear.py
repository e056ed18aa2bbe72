"""What the laws do not reach: several tiles, extreme decays, half precision, gradients of single arguments."""

import pytest
import torch

from omnimix.cli.check_kernels import error
from omnimix.kernels import Draw, gated_linear

SHAPES = {"head": lambda b, t, h, k: (h,), "scalar": lambda b, t, h, k: (b, t, h), "channel": lambda *s: s}

pytestmark = pytest.mark.triton


def arguments(form, t=20, g=1, h=1, k=5, v=7, dtype=torch.float64, bonus=False, strength=1.0):
    draw = Draw.seeded(3, dtype=dtype)
    made = {
        "q": draw.normal(1, t, g, k),
        "k": draw.normal(1, t, g, k),
        "v": draw.normal(1, t, h, v),
        "decay": None if form is None else draw.log_decay(*SHAPES[form](1, t, h, k), scale=strength),
    }
    return made | ({"bonus": draw.normal(h, k)} if bonus else {})


def both(made, **options):
    """Outputs, states and gradients of both backends, by name."""
    results = []
    for backend in ("triton", "reference"):
        leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in made.items()}
        output, state = gated_linear(**leaves, **options, backend=backend)
        draw = Draw.seeded(5, dtype=torch.float64)
        loss = (output.double() * draw.normal(*output.shape)).sum() + (state * draw.normal(*state.shape)).sum()
        loss.backward()
        results.append({"output": output, "state": state} | {n: x.grad for n, x in leaves.items() if x is not None})
    return results


def agree(made, tolerance=1e-10, **options):
    found, truth = both(made, **options)
    errors = {name: error(found[name], truth[name]) for name in truth}
    assert max(errors.values()) < tolerance, errors
    assert all(found[name].dtype == truth[name].dtype for name in truth)


@pytest.mark.parametrize("form", [None, "scalar", "channel"])
def test_several_tiles_of_keys_and_values(form):
    agree(arguments(form, t=18, k=70, v=80))


def test_the_widest_keys():
    agree(arguments("scalar", t=17, k=256, v=3))


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("form", ["scalar", "channel"])
def test_groups_with_a_bonus(form, bonus):
    agree(arguments(form, t=18, g=2, h=4, bonus=bonus))


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("form", ["head", "scalar", "channel"])
def test_decays_that_forget_everything(form, bonus):
    made = arguments(form, t=40, dtype=torch.float32, bonus=bonus, strength=0.01)
    # Beside -1e4 the small decays would be lost in a difference of running sums.
    made["decay"].view(-1)[::3] = -1e4
    agree(made, tolerance=1e-5)


def test_finite_for_large_inputs():
    made = arguments("channel", t=40, dtype=torch.float32, strength=100.0)
    found, _ = both({n: 100 * x for n, x in made.items()})
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    made = arguments("scalar", dtype=dtype)
    found, _ = both(made)
    truth, _ = both({n: x.double() for n, x in made.items()})
    # Interpreted, everything between load and store is float32: what is left is the rounding of the results.
    for name, tolerance in {
        "output": 2 * torch.finfo(dtype).eps,
        "state": 1e-5,
        "q": 2 * torch.finfo(dtype).eps,
    }.items():
        assert error(found[name], truth[name]) < tolerance
    assert found["output"].dtype == dtype and found["state"].dtype == torch.float32


@pytest.mark.parametrize("only", ["q", "v", "decay", "initial_state"])
@pytest.mark.parametrize("through", ["output", "state"])
def test_gradient_of_one_argument_through_one_result(only, through):
    made = arguments("scalar") | {"initial_state": Draw.seeded(4).normal(1, 1, 5, 7)}
    gradients = []
    for backend in ("triton", "reference"):
        leaves = {n: x.clone().requires_grad_(n == only) for n, x in made.items()}
        result = dict(zip(("output", "state"), gated_linear(**leaves, backend=backend), strict=True))[through]
        if (only, through) == ("q", "state"):
            return
        gradients += torch.autograd.grad(result.sin().sum(), leaves[only])
    assert error(*gradients) < 1e-10
