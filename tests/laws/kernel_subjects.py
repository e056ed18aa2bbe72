"""What the laws of kernels run on: every registered op, case and backend, and calls of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from omnimix.cli.check_kernels import Results, arguments_of, call_of, is_for, results
from omnimix.kernels import Case, Draw, Op, get_op, ops
from omnimix.kernels.common.tools import triton_refusal
from omnimix.kernels.native import machine_refusal
from omnimix.kernels.registry import serves_everything

from . import checker
from .checker import told


def as_drawn(arguments: dict) -> dict:
    return arguments


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


@dataclass(frozen=True)
class Asked:
    """One call: its size, whether it starts from a state, what is packed in it, and how its tensors lie in memory."""

    batch: int
    time: int
    state: bool = True
    lengths: tuple[int, ...] | None = None
    layout: Callable[[dict], dict] = as_drawn

    def __str__(self) -> str:
        packed = "" if self.lengths is None else f", packed {list(self.lengths)}"
        state = "with" if self.state else "without"
        return f"batch {self.batch}, {self.time} steps{packed}, {state} a state, {self.layout.__name__}"

    def of(self, case: Case) -> dict:
        lengths = None if self.lengths is None else list(self.lengths)
        drawn = arguments_of(case, Draw.seeded(self.time), self.batch, self.time, state=self.state, lengths=lengths)
        return self.layout(drawn)


def packed(*lengths: int, state: bool = True, layout: Callable[[dict], dict] = as_drawn) -> Asked:
    return Asked(1, sum(lengths), state, lengths, layout)


@functools.lru_cache(maxsize=32)
def defined(op: str, case: Case, asked: Asked, backward: bool) -> Results:
    """What the definition gives, computed once for all backends, whose tests follow each other."""
    return results(call_of(get_op(op), "reference"), asked.of(case), backward=backward)


@dataclass(frozen=True)
class Subject:
    """One backend of one op on one case.

    Args:
        op, case, backend: these.
        first: whether the case is the op's first, on which laws run that cost much and depend little on the case.
    """

    op: Op
    case: Case
    backend: str
    first: bool

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
        limits = self.op.backend(self.backend).limits
        return limits is not serves_everything and not self.serves(self.draw(1, 1), backward=True)

    def draw(self, batch: int, time: int, state: bool = True) -> dict:
        return Asked(batch, time, state).of(self.case)

    def serves(self, arguments: dict, *, backward: bool) -> bool:
        return is_for(self.op, self.backend, arguments, backward=backward)

    def modes(self, batch: int, time: int) -> list[bool]:
        """With gradients (True) and in inference mode (False), as far as the backend is for such a call."""
        return [backward for backward in (True, False) if self.serves(self.draw(batch, time), backward=backward)]

    def agrees(self, asked: Asked, backward: bool) -> None:
        """Laws 1 and 10, on one call."""
        truth = defined(self.op.name, self.case, asked, backward)
        with told(asked), mode(backward):
            checker.agrees(self.call, self.reference, asked.of(self.case), backward=backward, truth=truth)


@contextlib.contextmanager
def mode(backward: bool) -> Iterator[None]:
    """With gradients, or in inference mode; a failure says which."""
    with told("with gradients" if backward else "inference mode"), torch.inference_mode(not backward):
        yield


def served_backends(op: Op) -> list[str]:
    """The op's backends, without those for which this machine has no compiler (a law asserts that they say so)."""
    missing = {"native": machine_refusal(), "triton": triton_refusal({})}
    return [b.name for b in op.backends if missing.get(b.name) is None]


# Cases are made anew, and their functions checked anew, each time that an op is asked for them.
EVERY = [
    Subject(op, case, name, first=i == 0)
    for op in ops()
    for i, case in enumerate(op.cases())
    for name in served_backends(op)
]


def of(keep: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    """Every backend, also those that are for few calls; the test itself asks for which."""
    # Triton's interpreter is slow, and `make test-fast` runs the other backends on the first case of every op.
    kept = [
        pytest.param(s, marks=[] if s.first and not is_interpreted(s) else pytest.mark.slow) for s in EVERY if keep(s)
    ]
    return pytest.mark.parametrize("subject", kept, ids=str)


def subjects(keep: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    """Every backend that serves calls of any length with gradients."""
    return of(lambda s: not s.limited and keep(s))


def is_reference(subject: Subject) -> bool:
    return subject.backend == "reference"


def is_optimised(subject: Subject) -> bool:
    return subject.backend != "reference"


def is_interpreted(subject: Subject) -> bool:
    """Triton's interpreter computes bfloat16 wrongly and takes minutes for long inputs."""
    return subject.backend == "triton"
