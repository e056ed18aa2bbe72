"""What the laws do not reach: several tiles, extreme decays, half precision, correlated keys, single gradients."""

import pytest
import torch

from omnimix.cli.check_kernels import error
from omnimix.errors import BackendUnavailable
from omnimix.kernels import Draw, delta_rule

SHAPES = {"scalar": lambda b, t, h, k: (b, t, h), "channel": lambda *s: s}

pytestmark = pytest.mark.triton


def arguments(form, general=False, t=20, g=1, h=1, k=5, v=7, dtype=torch.float64, strength=1.0):
    draw = Draw.seeded(3, dtype=dtype)
    key = torch.nn.functional.normalize(draw.normal(1, t, g, k), dim=-1)
    made = {
        "q": draw.normal(1, t, g, k),
        "k": key,
        "v": draw.normal(1, t, h, v),
        "decay": None if form is None else draw.log_decay(*SHAPES[form](1, t, h, k), scale=strength),
    }
    if general:
        return made | {"a": -key, "b": key * draw.uniform(0.0, 1.0, 1, t, g, k)}
    return made | {"beta": draw.uniform(0.0, 2.0, 1, t, h)}


def both(made, **options):
    """Outputs, states and gradients of both backends, by name."""
    results = []
    for backend in ("triton", "reference"):
        leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in made.items()}
        output, state = delta_rule(**leaves, **options, backend=backend)
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


@pytest.mark.parametrize(("form", "general"), [("scalar", False), ("channel", True)])
def test_several_tiles_of_keys_and_values(form, general):
    agree(arguments(form, general, t=18, k=70, v=40))


def test_grouped_keys_in_the_general_form():
    agree(arguments("scalar", general=True, t=18, g=2, h=4))


@pytest.mark.parametrize(("form", "general"), [("scalar", True), ("channel", False)])
def test_decays_that_forget_everything(form, general):
    made = arguments(form, general, t=40, dtype=torch.float32, strength=0.01)
    # Beside -1e4 the small decays would be lost in a difference of running sums.
    made["decay"].view(-1)[::3] = -1e4
    agree(made, tolerance=2e-5)


def test_keys_that_are_all_the_same():
    # The inverse of the scores is then a sum of large powers that cancel, if computed so.
    made = arguments(None, t=64, dtype=torch.float32)
    made["k"] = made["k"][:, :1].expand_as(made["k"])
    made["beta"] = torch.full_like(made["beta"], 1.95)
    agree(made, tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    made = arguments("scalar", general=True, dtype=dtype)
    found, _ = both(made)
    truth, _ = both({n: x.double() for n, x in made.items()})
    # Interpreted, everything between load and store is float32: what is left is the rounding of the results.
    for name, tolerance in {
        "output": 2 * torch.finfo(dtype).eps,
        "state": 1e-5,
        "a": 2 * torch.finfo(dtype).eps,
    }.items():
        assert error(found[name], truth[name]) < tolerance
    assert found["output"].dtype == dtype and found["state"].dtype == torch.float32


@pytest.mark.parametrize(
    ("only", "through"), [("q", "output"), ("beta", "state"), ("v", "state"), ("initial_state", "output")]
)
def test_gradient_of_one_argument_through_one_result(only, through):
    made = arguments("scalar", t=10) | {"initial_state": Draw.seeded(4).normal(1, 1, 5, 7)}
    gradients = []
    for backend in ("triton", "reference"):
        leaves = {n: x.clone().requires_grad_(n == only) for n, x in made.items()}
        result = dict(zip(("output", "state"), delta_rule(**leaves, backend=backend), strict=True))[through]
        gradients += torch.autograd.grad(result.sin().sum(), leaves[only])
    assert error(*gradients) < 1e-10


def test_refuses_keys_wider_than_a_tile():
    with pytest.raises(BackendUnavailable, match="128 channels, not 130"):
        delta_rule(**arguments("scalar", t=2, k=130), backend="triton")
