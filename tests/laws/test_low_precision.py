"""Law 7 at the published initial values, where decays are close to 1 and what is rounded in them adds up over time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from omnimix.backbones.parameters import initialise
from omnimix.cli.check_kernels import BFLOAT16_TINY, rms
from omnimix.kernels.registry import Op

from .subjects import CAUSAL, DEPTH, Alone, Subject, mixer_subjects, tokens
from .zeros import without_zeros

TIME = 1000
# By what name ops take decays, where it is not "decay".
DECAYS = {"linear_recurrence": "a", "selective_scan": "A"}


def published(subject: Subject) -> tuple[Alone, Alone]:
    """The layer with the values that a backbone gives it but for zeros, in bfloat16, and in float64 with these same."""
    torch.manual_seed(1)
    module = Alone(subject.build())
    initialise(module)
    rounded = without_zeros(module).bfloat16()
    return rounded, copy.deepcopy(rounded).double()


@contextmanager
def projections_rounded(module: nn.Module) -> Iterator[None]:
    """Round what linear layers return to bfloat16: what any implementation in bfloat16 loses at least."""
    hooks = [
        layer.register_forward_hook(lambda layer, x, y: y.bfloat16().to(y.dtype))
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def excess(subject: Subject) -> float:
    """By how much the error in bfloat16 exceeds twice that of rounded projections; at most 1 is allowed."""
    rounded, exact = published(subject)
    x = tokens(1, TIME, torch.bfloat16)
    with torch.no_grad():
        truth, _ = exact(x.double(), CAUSAL)
        with projections_rounded(exact):
            plain, _ = exact(x.double(), CAUSAL)
        found, _ = rounded(x, CAUSAL)
    allowed = 2 * rms(plain - truth) + BFLOAT16_TINY * rms(truth)
    return rms(found.double() - truth) / allowed


def loses_no_more_than_its_projections(subject: Subject) -> None:
    e = excess(subject)
    assert e <= 1, f"in bfloat16 the error over {TIME} tokens is {e:.2f} times what is allowed"


def keeps_its_decays(subject: Subject) -> None:
    """What ops are given as decays in bfloat16 is wider than that, and was not rounded to it on the way."""
    seen: list[tuple[str, Tensor]] = []
    dispatch = Op.dispatch

    def recorded(op: Op, backend: str, **arguments: Any) -> Any:
        decay = arguments.get(DECAYS.get(op.name, "decay"))
        if decay is not None:
            seen.append((op.name, decay))
        return dispatch(op, backend, **arguments)

    rounded, _ = published(subject)
    with torch.no_grad(), mock.patch.object(Op, "dispatch", recorded):
        rounded(tokens(1, 9, torch.bfloat16), CAUSAL)
    for name, decay in seen:
        assert decay.dtype != torch.bfloat16, f"{name} is given a decay in bfloat16"
        assert not torch.equal(decay, decay.bfloat16().to(decay.dtype)), f"{name} is given a decay that was rounded"


LAYERS = mixer_subjects("forward", (0, DEPTH - 1))


@pytest.mark.parametrize("subject", LAYERS, ids=lambda s: s.name)
def test_law_7_at_the_published_initialisation(subject: Subject):
    loses_no_more_than_its_projections(subject)
    keeps_its_decays(subject)
