"""The checker is checked: deliberate mistakes in mixers, none of which may pass the laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import test_mixer_laws as laws
from .mutations import MUTATIONS, Mutation
from .subjects import Subject, mixer_subjects
from .test_low_precision import keeps_its_decays, loses_no_more_than_its_projections
from .test_references import equals_its_reference, equals_its_reference_token_by_token

# What a mutation itself may do wrong, and what no law is to be praised for.
BROKEN = (SyntaxError, NameError, AttributeError, TypeError)


def _law_12(subject: Subject) -> None:
    equals_its_reference(subject, causal=True)
    equals_its_reference_token_by_token(subject)


def _law_7(subject: Subject) -> None:
    loses_no_more_than_its_projections(subject)
    keeps_its_decays(subject)


def _law_12_both_ways(subject: Subject) -> None:
    equals_its_reference(subject, causal=False)


LAWS: dict[int, Callable[[Subject], None]] = {
    2: laws.test_law_2_pieces_are_the_whole,
    3: laws.test_law_3_packed_is_each_alone,
    7: _law_7,
    12: _law_12,
}


def catches(law: int, mixer: str) -> str | None:
    """What a law says of a mixer in any of its examples, first and last layer; None where it passes."""
    tried = [(LAWS[law], subject) for subject in mixer_subjects("forward")]
    if law == 12:
        tried += [(_law_12_both_ways, subject) for subject in mixer_subjects("bidirectional")]
    for function, subject in tried:
        if subject.mixer == mixer:
            try:
                function(subject)
            except BROKEN:
                raise
            except Exception as problem:
                return f"{subject.name}: {type(problem).__name__} {problem}".splitlines()[0]
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.mixer}: {m.name}")
def test_a_law_catches(mutation: Mutation, monkeypatch: pytest.MonkeyPatch):
    mutation.apply(monkeypatch)
    caught = catches(mutation.law, mutation.mixer)
    assert caught, f"law {mutation.law} does not see that {mutation.mixer} has {mutation.name!r}"
    print(f"{mutation.mixer:16}{mutation.name:40}law {mutation.law:<4}{caught}")
