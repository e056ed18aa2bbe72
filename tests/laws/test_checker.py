"""The checker is checked: each law must catch the mistake that it is there for."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.testing._internal.optests import OpCheckError

from omnimix.cli.check_kernels import arguments_of, call_of, results
from omnimix.kernels import Draw, get_op

from . import checker
from .ran import runs

OP = get_op("short_conv")
CASE = OP.cases()[0]
RIGHT = call_of(OP, "reference")
SEQUENCES = OP.sequences


def call(batch: int = 2, time: int = 12, **options) -> dict:
    return arguments_of(CASE, Draw.seeded(1), batch, time, **options)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def with_gradient_times(factor: float, name: str):
    def wrong(**arguments):
        return RIGHT(**(arguments | {name: ScaledGradient.apply(arguments[name], factor)}))

    return wrong


def on_output(change):
    def wrong(**arguments):
        y, state = RIGHT(**arguments)
        return change(y), state

    return wrong


def on_state(change):
    def wrong(**arguments):
        y, state = RIGHT(**arguments)
        return y, change(state)

    return wrong


def drop_tail(y):
    return torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1)


def leaky(*, cu_seqlens=None, initial_state=None, **arguments):
    """Starts packed sequences with what stands before them."""
    y, state = RIGHT(**arguments, cu_seqlens=cu_seqlens, initial_state=initial_state)
    whole, _ = RIGHT(**arguments)
    return torch.cat([y[:, :3], whole[:, 3:4], y[:, 4:]], dim=1), state


def forgetful(*, initial_state=None, **arguments):
    return RIGHT(**arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        *(with_gradient_times(-1, name) for name in ("x", "weight", "bias", "initial_state")),
        *(with_gradient_times(0, name) for name in ("x", "weight", "bias", "initial_state")),
        with_gradient_times(1 + 1e-6, "weight"),
        on_output(lambda y: y.roll(1, dims=1)),
        on_output(drop_tail),
        on_output(lambda y: y.detach()),
        on_output(lambda y: y.float()),
        on_output(lambda y: y * torch.nan),
        on_state(lambda s: s.roll(1, dims=-1)),
        on_state(lambda s: s.detach()),
        forgetful,
    ],
)
def test_disagreement_is_caught(wrong):
    checker.agrees(RIGHT, RIGHT, call())
    with pytest.raises(AssertionError):
        checker.agrees(wrong, RIGHT, call())


def test_a_gradient_cut_in_the_definition_is_caught():
    checker.has_true_gradients(RIGHT, call(1, 3))
    for wrong in (with_gradient_times(-1, "x"), on_output(lambda y: y + y.detach())):
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            checker.has_true_gradients(wrong, call(1, 3))


@pytest.mark.parametrize(
    "wrong", [forgetful, on_state(torch.zeros_like), on_state(lambda s: s.detach()), on_state(lambda s: s.flip(-1))]
)
def test_a_broken_state_is_caught(wrong):
    checker.splits(RIGHT, call(), SEQUENCES, [5, 1, 6])
    with pytest.raises(AssertionError):
        checker.splits(wrong, call(), SEQUENCES, [5, 1, 6])


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("wrong", [leaky, on_output(lambda y: y + 1e-6 * y.sum(1, keepdim=True))])
def test_a_leak_over_a_border_is_caught(wrong, state):
    lengths = [3, 4, 5]
    arguments = call(1, 12, lengths=lengths, state=state)
    checker.packs(RIGHT, arguments, SEQUENCES, lengths, has_state=True)
    with pytest.raises(AssertionError):
        checker.packs(wrong, arguments, SEQUENCES, lengths, has_state=True)


def test_a_gradient_over_a_border_is_caught():
    def wrong(**arguments):
        y, state = RIGHT(**arguments)
        # The value is right; only the gradient of what stands before the border is not.
        return y + (y.sum(1, keepdim=True) - y.sum(1, keepdim=True).detach()), state

    with pytest.raises(AssertionError, match="gradient"):
        checker.packs(wrong, call(1, 12, lengths=[3, 4, 5]), SEQUENCES, [3, 4, 5], has_state=True)


def test_rows_that_depend_on_each_other_are_caught():
    checker.rows_are_independent(RIGHT, call(), SEQUENCES)
    with pytest.raises(AssertionError):
        checker.rows_are_independent(on_output(lambda y: y + 1e-6 * y.mean(0)), call(), SEQUENCES)


def test_unequal_repetition_is_caught():
    checker.repeats(RIGHT, call())
    with pytest.raises(AssertionError):
        checker.repeats(on_output(lambda y: y * (1 + 1e-15 * torch.randn_like(y))), call())


def test_a_look_ahead_is_caught():
    checker.is_causal(RIGHT, call(), SEQUENCES, at=7)
    with pytest.raises(AssertionError, match="reaches back"):
        checker.is_causal(on_output(lambda y: y + 1e-3 * y.roll(-1, dims=1)), call(), SEQUENCES, at=7)


def in_bfloat16(times: float):
    """Computes well, and multiplies the error that comes from rounding the output."""

    def function(**arguments):
        y, state = RIGHT(**arguments)
        if y.dtype == torch.bfloat16:
            exact = RIGHT(**{n: a.double() if n in ("x", "weight", "bias") else a for n, a in arguments.items()})[0]
            y = (exact + times * (y.double() - exact)).to(torch.bfloat16)
        return y, state

    return function


def test_lost_precision_is_caught():
    arguments = call(2, 65)
    checker.keeps_precision(in_bfloat16(1), RIGHT, arguments)
    with pytest.raises(AssertionError, match="bfloat16"):
        checker.keeps_precision(in_bfloat16(5), RIGHT, arguments)


def test_overflow_is_caught():
    checker.stays_finite(RIGHT, CASE, 20, torch.float32, backward=True)
    with pytest.raises(AssertionError, match="not finite"):
        checker.stays_finite(on_output(lambda y: y.exp()), CASE, 20, torch.float32, backward=True)


def test_a_graph_break_is_caught(without_shape_checks):
    def breaks(**arguments):
        torch._dynamo.graph_break()
        return RIGHT(**arguments)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        checker.compiles(breaks, call(1, 2))


@pytest.mark.triton
@pytest.mark.parametrize("time", [1, 3])
def test_a_backend_in_another_ones_place_is_caught(time):
    """Whichever of the four does the work, with gradients or without, only its own name is accepted."""
    arguments = call(2, time)
    names = [b.name for b in OP.backends]
    assert len(names) == 4
    for runs_really in names:
        for named in names:
            for run in (lambda n=runs_really: call_of(OP, n)(**arguments), lambda n=runs_really: gradients_by(n, time)):
                if named == runs_really:
                    runs("short_conv", named, run)
                else:
                    with pytest.raises(AssertionError, match="ran, not"):
                        runs("short_conv", named, run)


def gradients_by(backend: str, time: int) -> None:
    results(call_of(OP, backend), call(2, time))


@pytest.mark.triton
def test_a_native_or_triton_backend_that_only_calls_torch_is_caught():
    for name in ("native", "triton"):
        module = import_module(f"omnimix.kernels.short_conv.{name}")
        # The right file runs, and does nothing of its own.
        source = compile("def empty(call): call()", module.__file__, "exec")
        exec(source, space := {})
        with pytest.raises(AssertionError, match="0 calls of C|0 launches"):
            runs("short_conv", name, lambda empty=space["empty"]: empty(lambda: torch.ones(2) + 1))


@torch.library.custom_op("omnimix::test_alias", mutates_args=())
def alias(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@alias.register_fake
def _(x):
    # The real output has x's strides.
    return torch.empty_like(x.contiguous())


def test_an_unsound_custom_op_is_caught():
    arguments = {"x": torch.randn(3, 4).t()}
    with pytest.raises(OpCheckError):
        checker.custom_ops_are_sound(lambda x: alias(x).detach(), arguments, ["test_schema", "test_faketensor"])
