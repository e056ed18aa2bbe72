"""The laws, over every registered op, case and backend: one test for each law and subject, over all of its calls."""

from __future__ import annotations

import contextlib

import pytest
import torch

from omnimix.cli.check_kernels import arguments_of, differentiable, results
from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import Draw, Op, explain, ops, strict, using
from omnimix.kernels.native import machine_refusal

from . import checker
from .checker import told
from .kernel_subjects import (
    EVERY,
    Asked,
    Subject,
    expanded,
    is_interpreted,
    is_optimised,
    is_reference,
    mode,
    of,
    packed,
    strided,
    subjects,
)
from .ran import runs


def of_any_length(subject: Subject) -> list[tuple[Asked, bool]]:
    """The calls that a backend is held to the definition on, and whether with gradients.

    Together {1, 2, 63, 64, 65, 127} steps. Of Triton's kernels only the first case sees all of them.
    """
    few = is_interpreted(subject) and not subject.first
    differentiated = [Asked(2, 1), Asked(1 if few else 2, 65)] + ([] if few else [Asked(1, 127, state=False)])
    inferred = [Asked(2, 1, layout=strided), Asked(2, 2, state=False), Asked(1, 64, state=False)]
    inferred += [] if few else [Asked(2, 1), Asked(2, 2, state=False, layout=strided), Asked(1, 63)]
    strides = [Asked(2, 18, layout=layout) for layout in (strided, expanded)]
    # The next law but one has strided tensors too.
    strides = strides[1:] if few and subject.case.packed else strides
    calls = [(asked, True) for asked in differentiated + strides] + [(asked, False) for asked in inferred]
    if not subject.limited:
        return calls
    return [(a, backward) for a, backward in calls if subject.serves(a.of(subject.case), backward=backward)]


@subjects(is_reference)
def test_the_definition_has_true_gradients(subject):
    checker.has_true_gradients(subject.reference, subject.draw(1, 3))


@of(is_optimised)
def test_agrees_with_the_definition(subject):
    calls = of_any_length(subject)
    assert calls
    for asked, backward in calls:
        subject.agrees(asked, backward)


def test_the_definition_is_agreed_with_at_every_length():
    for op in ops():
        for subject in (s for s in EVERY if s.op is op and s.first and is_optimised(s) and not s.limited):
            assert {asked.time for asked, _ in of_any_length(subject)} >= {1, 2, 63, 64, 65, 127}


@of(lambda s: s.stateful)
def test_pieces_are_the_whole(subject):
    few = is_interpreted(subject)
    differentiated = [(0, 1, 20)] if few else [(1, 20), (64, 3), (1, 1), (0, 2, 0)]
    # A step kernel's pieces are the whole of the definition.
    inferred = [(1, 1, 1)] if subject.limited else [(3, 0, 1, 2)] if few else [(1, 1, 1), (1, 20), (3, 0, 1, 2)]
    whole = subject.reference if subject.limited else None
    for backward in subject.modes(2, 1):
        for lengths in differentiated if backward else inferred:
            arguments = subject.draw(1 if backward else 2, sum(lengths), state=lengths[0] < 2)
            with told(f"pieces {lengths}"), mode(backward):
                checker.splits(
                    subject.forwards, arguments, subject.op.sequences, lengths, backward=backward, whole=whole
                )


# A call takes Triton's interpreter long. Its kernels are held to the definition, packed and in several rows, with all
# gradients; and the definition to what follows of rows, packed sequences and the future.


@subjects(lambda s: s.case.packed and not is_interpreted(s))
def test_packed_sequences_are_each_alone(subject):
    for lengths, backward in [((3, 64, 1, 20), True), ((0, 3, 0, 0, 2, 0), True), ((1, 5, 0, 1, 2, 0), False)]:
        arguments = packed(*lengths).of(subject.case)
        with told(packed(*lengths)), mode(backward):
            checker.packs(
                subject.call, arguments, subject.op.sequences, lengths, has_state=subject.stateful, backward=backward
            )


@subjects(lambda s: is_optimised(s) and s.case.packed)
def test_packed_sequences_agree_with_the_definition(subject):
    subject.agrees(packed(1, 65, 0, 10, layout=strided), backward=True)
    subject.agrees(packed(0, 2, 3, 0, state=False, layout=strided), backward=True)


@subjects(lambda s: s.op.sequences)
def test_without_tokens_nothing_changes(subject):
    # The last entry of test_time's state is a place in a mini-batch.
    kind = {"has_state": subject.stateful, "counts": int(subject.op.name == "test_time")}
    for state in (True, False):
        calls = [Asked(2, 0, state)]
        if subject.case.packed:
            calls += [packed(*lengths, state=state) for lengths in ((0,), (0, 0, 0), ())]
        for asked in calls:
            arguments = asked.of(subject.case)
            for backward in (True, False):
                with told(asked), mode(backward):
                    checker.leaves_the_state(subject.call, arguments, **kind, backward=backward)


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


@of(lambda s: is_optimised(s) and not s.op.sequences)
def test_without_rows_agrees_with_the_definition(subject):
    for backward in subject.modes(2, 0):
        subject.agrees(Asked(2, 0), backward)


BROKEN = ([1, 5], [0, 6], [0, 4], [0, 3, 2, 5], [0, -1, 5], [0, 2**31 - 1, 5], [[0, 5]], [0.0, 5.0])


@subjects(lambda s: s.case.packed and s.first)
def test_boundaries_that_do_not_cut_the_steps_are_refused(subject, without_shape_checks):
    """Each by name at the door, so that no kernel leaves its tensors."""
    for edges in BROKEN:
        arguments = subject.draw(1, 5, state=False) | {"cu_seqlens": torch.tensor(edges)}
        with pytest.raises(UnsupportedShape, match="cu_seqlens"):
            subject.call(**arguments)
    with pytest.raises(UnsupportedShape, match="cu_seqlens"):
        subject.call(**subject.draw(2, 5, state=False), cu_seqlens=torch.tensor([0, 5]))


@subjects(lambda s: s.op.causal and not is_interpreted(s))
def test_causal(subject):
    checker.is_causal(subject.forwards, subject.draw(1, 20), subject.op.sequences, at=13)


@of(lambda s: bool(s.op.sequences) and not is_interpreted(s))
def test_batch_rows_are_independent(subject):
    for time in (1, 18):
        for backward in subject.modes(2, time):
            # With gradients the kernels for single steps are those for many.
            if time > 1 or not backward:
                with told(f"{time} steps"), mode(backward):
                    checker.rows_are_independent(
                        subject.call, subject.draw(2, time), subject.op.sequences, backward=backward
                    )


@of(lambda s: s.first or not is_interpreted(s))
def test_repeats_to_the_bit(subject):
    for time in (1, 18):
        for backward in subject.modes(2, time):
            if time > 1 or not backward:
                with told(f"{time} steps"), mode(backward):
                    checker.repeats(subject.call, subject.draw(2, time), backward=backward)


@subjects(lambda s: not is_interpreted(s))
def test_keeps_precision_in_bfloat16(subject):
    checker.keeps_precision(subject.call, subject.reference, subject.draw(2, 65))


# What callers keep in float32 among inputs in bfloat16, and ops whose states are inputs, in the dtype of these.
WIDE, WINDOWS = ("initial_state", "decay", "A", "w1", "b1", "w2", "b2"), ("short_conv", "long_conv")


@of(lambda s: s.stateful and is_optimised(s) and not is_interpreted(s) and s.op.name not in WINDOWS)
def test_states_of_bfloat16_inputs_are_right_to_float32(subject):
    for time in (1, 70):
        for backward in subject.modes(2, time):
            with told(f"{time} steps"), mode(backward):
                checker.keeps_wide_what_is_wide(
                    subject.call, subject.reference, subject.draw(2, time), WIDE, backward=backward
                )


@subjects(lambda s: is_optimised(s) and not is_interpreted(s))
def test_stays_finite(subject):
    checker.stays_finite(subject.call, subject.case, 1024, torch.float32, backward=True)
    checker.stays_finite(subject.call, subject.case, 16384, torch.bfloat16, backward=False)


@pytest.mark.slow
@subjects(lambda s: is_optimised(s) and s.first)
def test_custom_ops_are_sound(subject, without_shape_checks):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checker.custom_ops_are_sound(subject.call, subject.draw(2, 5), [*checks, "test_aot_dispatch_dynamic"])
    if subject.case.packed:
        checker.custom_ops_are_sound(subject.call, packed(2, 5, state=False).of(subject.case), checks)


@pytest.mark.slow
@subjects(lambda s: is_optimised(s) and s.first)
def test_compiles_whole(subject, without_shape_checks):
    checker.compiles(subject.call, subject.draw(2, 17))
    if not is_interpreted(subject):
        checker.compiles(subject.call, subject.draw(2, 1))
    if subject.case.packed:
        checker.compiles(subject.call, packed(4, 13).of(subject.case))


@pytest.mark.parametrize("subject", [s for s in EVERY if s.limited], ids=str)
def test_a_step_kernel_says_what_it_is_not_for(subject):
    step = subject.draw(1, 1)
    assert subject.serves(step, backward=False) and not subject.serves(step, backward=True)
    if subject.op.sequences:
        with pytest.raises(BackendUnavailable, match=f"backend '{subject.backend}' cannot serve this call"):
            subject.call(**subject.draw(2, 18))
    with pytest.raises(BackendUnavailable, match="no gradients"):
        results(subject.call, step)


@of()
def test_the_backend_named_is_the_one_that_runs(subject):
    calls = [Asked(2, 1), Asked(2, 3)]
    calls += [packed(1, 2)] if subject.case.packed and not subject.limited else []
    for asked in calls:
        arguments = asked.of(subject.case)
        for backward in (True, False):
            if subject.serves(arguments, backward=backward):
                with told(asked), mode(backward):
                    runs(
                        subject.op.name,
                        subject.backend,
                        lambda a=arguments, b=backward: results(subject.call, a, backward=b),
                    )


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_what_explain_says_is_what_runs(op):
    """In strict mode too: that a call is not of a backend's kind is no reason to raise."""
    for name in (None, "chunked", "native"):
        for backward in (True, False):
            for time in (1, 3):
                with told(f"named {name}, gradients {backward}, {time} steps"):
                    explains(op, name, backward, time)


def explains(op: Op, name: str | None, backward: bool, time: int) -> None:
    arguments = arguments_of(op.cases()[0], Draw.seeded(time), 2, time)
    for leaf in differentiable(arguments):
        arguments[leaf].requires_grad_(backward)
    with strict(), torch.set_grad_enabled(backward), contextlib.nullcontext() if name is None else using(name):
        chosen = [row["backend"] for row in explain(op.name, **arguments) if row["auto"] == "chosen"]
        assert len(chosen) == 1
        if backward:
            runs(op.name, chosen[0], lambda: results(op.function, arguments))
        else:
            runs(op.name, chosen[0], lambda: op.function(**arguments))


NATIVE = [op for op in ops() if "native" in [b.name for b in op.backends]]


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_native_kernels_serve_this_machine_or_say_why_not(op):
    (row,) = (row for row in op.explain(op.cases()[0].make(Draw.seeded(), 1, 1)) if row["backend"] == "native")
    print(row)
    if machine_refusal() is None:
        assert row["auto"] == "chosen"
    else:
        assert row["why"] == machine_refusal()
