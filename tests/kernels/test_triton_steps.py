"""The kernel for one step: its custom ops, torch.compile, half precision, and keys too wide for it."""

import pytest
import torch

from omnimix.cli.check_kernels import error, results
from omnimix.kernels import Draw, delta_rule, gated_linear

pytestmark = pytest.mark.triton


def arguments(op, dtype=torch.float64):
    draw = Draw.seeded(3, dtype=dtype)
    made = {
        "q": draw.normal(1, 1, 1, 5),
        "k": draw.normal(1, 1, 1, 5),
        "v": draw.normal(1, 1, 2, 33),
        "decay": draw.log_decay(1, 1, 2, 5),
        "initial_state": Draw.seeded(4).normal(1, 2, 5, 33).to(torch.promote_types(dtype, torch.float32)),
    }
    if op is delta_rule:
        return made | {"a": draw.normal(1, 1, 1, 5), "b": draw.normal(1, 1, 1, 5)}
    return made | {"bonus": draw.normal(2, 5)}


def triton_call(op):
    return lambda **made: op(**made, backend="triton")


def test_keys_too_wide_for_it_take_the_chunks():
    draw = Draw.seeded(3)
    q, k, v = draw.normal(1, 1, 1, 260), draw.normal(1, 1, 1, 260), draw.normal(1, 1, 1, 3)
    (output, state), (true_output, true_state) = (gated_linear(q, k, v, backend=b) for b in ("triton", "reference"))
    assert error(output, true_output) < 1e-10 and error(state, true_state) < 1e-10


@pytest.mark.parametrize("op", [gated_linear, delta_rule])
def test_custom_ops_are_sound(op, without_shape_checks):
    made = arguments(op)
    # Defines the custom op.
    triton_call(op)(**made)
    order = ("q", "k", "v", "decay", "bonus") if op is gated_linear else ("q", "k", "v", "a", "b", "decay")
    tensors = [made[name].requires_grad_() for name in (*order, "initial_state")]
    step = getattr(torch.ops.omnimix, f"{op.__name__}_triton_step")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(step, (*tensors, 0.5), test_utils=checks)


@pytest.mark.parametrize("op", [gated_linear, delta_rule])
def test_compiles_whole(op, without_shape_checks):
    compiled = torch.compile(triton_call(op), fullgraph=True, backend="aot_eager")
    found, truth = (results(f, arguments(op)).named() for f in (compiled, triton_call(op)))
    assert max(error(found[name], truth[name]) for name in truth) < 1e-12


@pytest.mark.parametrize("op", [gated_linear, delta_rule])
def test_half_precision_inputs(op):
    made = arguments(op, dtype=torch.bfloat16)
    output, state = triton_call(op)(**made)
    true_output, true_state = op(**{n: x.double() for n, x in made.items()}, backend="reference")
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert error(output, true_output) < 2 * torch.finfo(torch.bfloat16).eps and error(state, true_state) < 1e-5
