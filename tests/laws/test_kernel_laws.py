"""The laws, over every registered op, case and backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from omnimix.cli.check_kernels import arguments_of, call_of
from omnimix.kernels import Case, Draw, Op, ops
from omnimix.kernels.native import machine_refusal

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

    def draw(self, batch: int, time: int, **options) -> dict:
        return arguments_of(self.case, Draw.seeded(time), batch, time, **options)


def served_backends(op: Op) -> list[str]:
    """The op's backends, without the native one where this machine cannot compile it (which a test below asserts)."""
    return [b.name for b in op.backends if b.name != "native" or machine_refusal() is None]


def subjects(keep: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    every = [Subject(op, case, name) for op in ops() for case in op.cases() for name in served_backends(op)]
    return pytest.mark.parametrize("subject", [s for s in every if keep(s)], ids=str)


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
@pytest.mark.parametrize("lengths", [[1, 20], [64, 3], [1] * 2], ids=str)
def test_pieces_are_the_whole(subject, lengths):
    arguments = subject.draw(1, sum(lengths), state=lengths[0] == 1)
    checker.splits(subject.forwards, arguments, subject.op.sequences, lengths)


@subjects(lambda s: s.case.packed)
def test_packed_sequences_are_each_alone(subject):
    # A call takes the interpreter long; the next law has longer and more sequences.
    lengths = [5, 2] if is_interpreted(subject) else [3, 64, 1, 20]
    arguments = subject.draw(1, sum(lengths), lengths=lengths)
    checker.packs(subject.call, arguments, subject.op.sequences, lengths, has_state=subject.stateful)


@subjects(lambda s: is_optimised(s) and s.case.packed)
@pytest.mark.parametrize("state", [True, False])
def test_packed_sequences_agree_with_the_definition(subject, state):
    lengths = [1, 65, 10] if state else [2, 3]
    arguments = strided(subject.draw(1, sum(lengths), lengths=lengths, state=state))
    checker.agrees(subject.call, subject.reference, arguments)


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
    if subject.case.packed:
        checker.compiles(subject.call, subject.draw(1, 17, lengths=[4, 13]))


NATIVE = [op for op in ops() if "native" in [b.name for b in op.backends]]


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_native_kernels_serve_this_machine_or_say_why_not(op):
    (row,) = (row for row in op.explain(op.cases()[0].make(Draw.seeded(), 1, 2)) if row["backend"] == "native")
    print(row)
    if machine_refusal() is None:
        assert row["auto"] == "chosen"
    else:
        assert row["why"] == machine_refusal()
