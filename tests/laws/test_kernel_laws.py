"""The laws, over every registered op, case and backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from omnimix.cli.check_kernels import arguments_of, call_of, differentiable, is_for, results
from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import Case, Draw, Op, explain, ops, strict, using
from omnimix.kernels.native import machine_refusal
from omnimix.kernels.registry import serves_everything

from . import checker


@dataclass(frozen=True)
class Subject:
    """One backend of one op on one case."""

    op: Op
    case: Case
    backend: str

    def __str__(self) -> str:
        return f"{self.op.name}-{self.case.name}-{self.backend}".replace(" ", "_")

    @property
    def call(self) -> Callable:
        return call_of(self.op, self.backend)

    @property
    def reference(self) -> Callable:
        return call_of(self.op, "reference")

    @property
    def forwards(self) -> Callable:
        """The call; where the case runs back in time, with time turned round, so that it too looks backwards only."""
        if not self.draw(1, 1).get("reverse", False):
            return self.call
        return checker.mirrored(self.call, self.op.sequences)

    @property
    def stateful(self) -> bool:
        return self.case.state is not None

    @property
    def limited(self) -> bool:
        """Whether the backend is for some calls only, and these without gradients: the steps of decoding."""
        return self.op.backend(self.backend).limits is not serves_everything

    def draw(self, batch: int, time: int, **options) -> dict:
        return arguments_of(self.case, Draw.seeded(time), batch, time, **options)

    def serves(self, arguments: dict, *, backward: bool) -> bool:
        return is_for(self.op, self.backend, arguments, backward=backward)


def served_backends(op: Op) -> list[str]:
    """The op's backends, without the native one where this machine cannot compile it (which a test below asserts)."""
    return [b.name for b in op.backends if b.name != "native" or machine_refusal() is None]


EVERY = [Subject(op, case, name) for op in ops() for case in op.cases() for name in served_backends(op)]


def subjects(keep: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    """Every backend that serves calls of any length with gradients; the others are held to the laws below."""
    return pytest.mark.parametrize("subject", [s for s in EVERY if not s.limited and keep(s)], ids=str)


def inferring(
    keep: Callable[[Subject], bool], call: Callable[..., dict], values: Sequence = (None,)
) -> pytest.MarkDecorator:
    """Every backend and value for which the call is; a step kernel is for few calls, the others for all."""
    pairs = [(s, v) for s in EVERY if keep(s) for v in values if s.serves(call(s, v), backward=False)]
    return pytest.mark.parametrize(("subject", "value"), pairs, ids=str)


def is_reference(subject: Subject) -> bool:
    return subject.backend == "reference"


def is_optimised(subject: Subject) -> bool:
    return subject.backend != "reference"


def is_interpreted(subject: Subject) -> bool:
    """Triton's interpreter computes bfloat16 wrongly and takes minutes for long inputs."""
    return subject.backend == "triton"


def strided(arguments: dict) -> dict:
    """The same values behind other strides: heads before time, or every other element of a larger tensor."""

    def spread(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        if x.ndim == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack([x, x], dim=-1)[..., 0]

    return {name: spread(x) for name, x in arguments.items()}


def expanded(arguments: dict) -> dict:
    """One row for the whole batch, with stride 0."""
    batch = 2
    return {
        name: x[:1].expand_as(x) if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[0] == batch else x
        for name, x in arguments.items()
    }


@subjects(is_reference)
def test_the_definition_has_true_gradients(subject):
    checker.has_true_gradients(subject.reference, subject.draw(1, 3))


@subjects(is_optimised)
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 127])
def test_agrees_with_the_definition(subject, time):
    arguments = subject.draw(2 if time < 127 else 1, time, state=time in (1, 63, 65))
    checker.agrees(subject.call, subject.reference, arguments, backward=time in (1, 65, 127))


@subjects(is_optimised)
@pytest.mark.parametrize("layout", [strided, expanded])
def test_agrees_with_the_definition_at_any_strides(subject, layout):
    checker.agrees(subject.call, subject.reference, layout(subject.draw(2, 18)))


@subjects(lambda s: s.stateful)
@pytest.mark.parametrize("lengths", [[1, 20], [64, 3], [1] * 2, [0, 2, 0]], ids=str)
def test_pieces_are_the_whole(subject, lengths):
    arguments = subject.draw(1, sum(lengths), state=lengths[0] == 1)
    checker.splits(subject.forwards, arguments, subject.op.sequences, lengths)


@subjects(lambda s: s.case.packed)
def test_packed_sequences_are_each_alone(subject):
    # A call takes the interpreter long; the next law has longer and more sequences.
    for each in [[0, 5, 2, 0]] if is_interpreted(subject) else ([3, 64, 1, 20], [0, 3, 0, 0, 2, 0]):
        arguments = subject.draw(1, sum(each), lengths=each)
        checker.packs(subject.call, arguments, subject.op.sequences, each, has_state=subject.stateful)


@subjects(lambda s: is_optimised(s) and s.case.packed)
@pytest.mark.parametrize("state", [True, False])
def test_packed_sequences_agree_with_the_definition(subject, state):
    lengths = [1, 65, 0, 10] if state else [0, 2, 3, 0]
    arguments = strided(subject.draw(1, sum(lengths), lengths=lengths, state=state))
    checker.agrees(subject.call, subject.reference, arguments)


@subjects(lambda s: s.op.sequences)
@pytest.mark.parametrize("state", [True, False])
def test_without_tokens_nothing_changes(subject, state):
    calls = [subject.draw(2, 0, state=state)]
    if subject.case.packed:
        calls += [subject.draw(1, 0, state=state, lengths=lengths) for lengths in ([0], [0, 0, 0], [])]
    for arguments in calls:
        # The last entry of test_time's state is a place in a mini-batch.
        kind = {"has_state": subject.stateful, "counts": int(subject.op.name == "test_time")}
        checker.leaves_the_state(subject.call, arguments, **kind)
        with torch.inference_mode():
            checker.leaves_the_state(subject.call, arguments, **kind, backward=False)


@subjects(lambda s: s.op.sequences)
def test_a_batch_without_rows_has_none_in_its_outputs(subject):
    arguments = subject.draw(2, 5)
    steps = checker.steps_of(arguments, subject.op.sequences)
    none = {
        name: x[:0]
        if name == "initial_state" or checker.is_sequence(name, arguments, subject.op.sequences, steps)
        else x
        for name, x in arguments.items()
    }
    rows, whole = results(subject.call, none), results(subject.call, arguments)
    assert [tuple(o.shape) for o in rows.outputs] == [(0, *o.shape[1:]) for o in whole.outputs]


@subjects(lambda s: is_optimised(s) and not s.op.sequences)
def test_without_rows_agrees_with_the_definition(subject):
    checker.agrees(subject.call, subject.reference, subject.draw(2, 0))


@inferring(lambda s: is_optimised(s) and not s.op.sequences, lambda s, rows: s.draw(2, rows), [0])
def test_without_rows_agrees_with_the_definition_in_inference_mode(subject, value):
    with torch.inference_mode():
        checker.agrees(subject.call, subject.reference, subject.draw(2, value), backward=False)


BROKEN = ([1, 5], [0, 6], [0, 4], [0, 3, 2, 5], [0, -1, 5], [0, 2**31 - 1, 5], [[0, 5]], [0.0, 5.0])


@subjects(lambda s: s.case.packed and s.case.name == s.op.cases()[0].name)
def test_boundaries_that_do_not_cut_the_steps_are_refused(subject, without_shape_checks):
    """Each by name at the door, so that no kernel leaves its tensors."""
    for edges in BROKEN:
        arguments = subject.draw(1, 5, state=False) | {"cu_seqlens": torch.tensor(edges)}
        with pytest.raises(UnsupportedShape, match="cu_seqlens"):
            subject.call(**arguments)
    with pytest.raises(UnsupportedShape, match="cu_seqlens"):
        subject.call(**subject.draw(2, 5, state=False), cu_seqlens=torch.tensor([0, 5]))


@subjects(lambda s: s.op.causal)
def test_causal(subject):
    checker.is_causal(subject.forwards, subject.draw(1, 20), subject.op.sequences, at=13)


@subjects(lambda s: s.op.sequences)
def test_batch_rows_are_independent(subject):
    checker.rows_are_independent(subject.call, subject.draw(2, 18), subject.op.sequences)


@subjects()
def test_repeats_to_the_bit(subject):
    checker.repeats(subject.call, subject.draw(2, 18))


@subjects(lambda s: not is_interpreted(s))
def test_keeps_precision_in_bfloat16(subject):
    checker.keeps_precision(subject.call, subject.reference, subject.draw(2, 65))


@subjects(lambda s: is_optimised(s) and not is_interpreted(s))
def test_stays_finite(subject):
    checker.stays_finite(subject.call, subject.case, 1024, torch.float32, backward=True)
    checker.stays_finite(subject.call, subject.case, 16384, torch.bfloat16, backward=False)


@subjects(is_optimised)
def test_custom_ops_are_sound(subject, without_shape_checks):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    first = subject.case.name == subject.op.cases()[0].name
    # Tracing with symbolic sizes runs every kernel many times over.
    full = [*checks, "test_aot_dispatch_dynamic"] if first or not is_interpreted(subject) else checks
    checker.custom_ops_are_sound(subject.call, subject.draw(2, 5), full)
    if subject.case.packed:
        checker.custom_ops_are_sound(subject.call, subject.draw(1, 7, lengths=[2, 5], state=False), checks)


@subjects(is_optimised)
def test_compiles_whole(subject, without_shape_checks):
    checker.compiles(subject.call, subject.draw(2, 17))
    if not is_interpreted(subject):
        checker.compiles(subject.call, subject.draw(2, 1))
    if subject.case.packed:
        checker.compiles(subject.call, subject.draw(1, 17, lengths=[4, 13]))


def short(subject: Subject, time: int) -> dict:
    return subject.draw(1 if time > 2 else 2, time, state=time != 2)


@inferring(is_optimised, short, [1, 2, 65])
def test_agrees_with_the_definition_in_inference_mode(subject, value):
    arguments = short(subject, value)
    # A few rows times a matrix are quicker in C++ only where it reads the matrix as it lies in memory.
    served = [a for a in (arguments, strided(arguments)) if subject.serves(a, backward=False)]
    with torch.inference_mode():
        for each in served:
            checker.agrees(subject.call, subject.reference, each, backward=False)


def first_piece(subject: Subject, lengths: tuple[int, ...]) -> dict:
    return subject.draw(2, lengths[0])


@inferring(lambda s: s.stateful, first_piece, [(1, 1, 1), (1, 20), (3, 0, 1, 2)])
def test_pieces_are_the_whole_in_inference_mode(subject, value):
    arguments = subject.draw(2, sum(value))
    # A step kernel's pieces are the whole of the definition.
    whole = subject.reference if subject.limited else None
    lengths = [1] * sum(value) if subject.limited else value
    with torch.inference_mode():
        checker.splits(subject.forwards, arguments, subject.op.sequences, lengths, backward=False, whole=whole)


@subjects(lambda s: s.case.packed)
def test_packed_sequences_are_each_alone_in_inference_mode(subject):
    lengths = [1, 5, 0, 1, 2, 0]
    arguments = subject.draw(1, sum(lengths), lengths=lengths)
    with torch.inference_mode():
        checker.packs(
            subject.call, arguments, subject.op.sequences, lengths, has_state=subject.stateful, backward=False
        )


@inferring(lambda s: bool(s.op.sequences), lambda s, time: s.draw(2, time), [1, 18])
def test_batch_rows_are_independent_in_inference_mode(subject, value):
    with torch.inference_mode():
        checker.rows_are_independent(subject.call, subject.draw(2, value), subject.op.sequences, backward=False)


@inferring(lambda s: True, lambda s, time: s.draw(2, time), [1, 18])
def test_repeats_to_the_bit_in_inference_mode(subject, value):
    with torch.inference_mode():
        checker.repeats(subject.call, subject.draw(2, value), backward=False)


@pytest.mark.parametrize("subject", [s for s in EVERY if s.limited], ids=str)
def test_a_step_kernel_says_what_it_is_not_for(subject):
    step = subject.draw(1, 1)
    assert subject.serves(step, backward=False) and not subject.serves(step, backward=True)
    if subject.op.sequences:
        with pytest.raises(BackendUnavailable, match=f"backend '{subject.backend}' cannot serve this call"):
            subject.call(**subject.draw(2, 18))
    with pytest.raises(BackendUnavailable, match="no gradients"):
        results(subject.call, step)


@subjects()
@pytest.mark.parametrize("time", [1, 3])
def test_the_backend_named_is_the_one_that_runs(subject, time):
    checker.runs(subject.op.name, subject.backend, lambda: results(subject.call, subject.draw(2, time)))


@inferring(lambda s: True, lambda s, time: s.draw(2, time), [1, 3])
def test_the_backend_named_is_the_one_that_runs_in_inference_mode(subject, value):
    arguments = subject.draw(2, value)
    with torch.inference_mode():
        checker.runs(subject.op.name, subject.backend, lambda: subject.call(**arguments))


@subjects(lambda s: s.case.packed)
def test_the_backend_named_is_the_one_that_runs_on_packed_sequences(subject):
    arguments = subject.draw(1, 3, lengths=[1, 2])
    checker.runs(subject.op.name, subject.backend, lambda: results(subject.call, arguments))


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", [None, "chunked", "native"])
@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_what_explain_says_is_what_runs(op, name, backward):
    """In strict mode too: that a call is not of a backend's kind is no reason to raise."""
    for time in (1, 3):
        arguments = arguments_of(op.cases()[0], Draw.seeded(time), 2, time)
        for leaf in differentiable(arguments):
            arguments[leaf].requires_grad_(backward)
        with strict(), torch.set_grad_enabled(backward), contextlib.nullcontext() if name is None else using(name):
            chosen = [row["backend"] for row in explain(op.name, **arguments) if row["auto"] == "chosen"]
            assert len(chosen) == 1
            if backward:
                checker.runs(op.name, chosen[0], lambda a=arguments: results(op.function, a))
            else:
                checker.runs(op.name, chosen[0], lambda a=arguments: op.function(**a))


NATIVE = [op for op in ops() if "native" in [b.name for b in op.backends]]


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_native_kernels_serve_this_machine_or_say_why_not(op):
    (row,) = (row for row in op.explain(op.cases()[0].make(Draw.seeded(), 1, 1)) if row["backend"] == "native")
    print(row)
    if machine_refusal() is None:
        assert row["auto"] == "chosen"
    else:
        assert row["why"] == machine_refusal()
