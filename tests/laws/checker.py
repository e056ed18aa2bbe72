"""The laws of kernels as functions: each takes an op's function and arguments and raises AssertionError if broken.

A function here is an op's public one with the backend named (`call_of`). Calls are made in float64 on the CPU unless a
law says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.optests.generate_tests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from omnimix.cli.check_kernels import (
    FLOAT32_TOLERANCE,
    Results,
    arguments_of,
    cast,
    differentiable,
    error,
    low_precision_excess,
    results,
    to,
    weights_for,
)
from omnimix.kernels import Case, Draw

Function = Callable[..., Any]
Arguments = dict[str, Any]

TOLERANCE = 1e-9
# Rows of a matrix product may be summed in another order when there are more of them.
BLEED = 1e-12


def assert_equal(found: Results, truth: Results, tolerance: float = TOLERANCE) -> None:
    names = truth.named()
    assert found.named().keys() == names.keys()
    for name, x in found.named().items():
        assert x.dtype == names[name].dtype, f"{name}: {x.dtype} is not {names[name].dtype}"
        assert x.shape == names[name].shape, f"{name}: shape {tuple(x.shape)} is not {tuple(names[name].shape)}"
        assert (e := error(x, names[name])) <= tolerance, f"{name}: relative error {e:.2e} exceeds {tolerance:.0e}"


@contextlib.contextmanager
def told(*words: object) -> Iterator[None]:
    """Say in a failure for which of a test's calls it happened."""
    try:
        yield
    except Exception as problem:
        problem.add_note(f"in the call: {', '.join(str(word) for word in words)}")
        raise


def agrees(
    function: Function,
    reference: Function,
    arguments: Arguments,
    *,
    backward: bool = True,
    truth: Results | None = None,
) -> None:
    """Laws 1 and 10: outputs, final state and every gradient are the definition's.

    `truth` is what `reference` gives, where that is known already.
    """
    truth = results(reference, arguments, backward=backward) if truth is None else truth
    assert_equal(results(function, arguments, backward=backward), truth)


def has_true_gradients(reference: Function, arguments: Arguments) -> None:
    """Law 1: the definition's gradients are its finite differences."""
    names = differentiable(arguments)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = reference(**(arguments | dict(zip(names, tensors, strict=True))))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # gradcheck refuses outputs on which no input acts, such as a state of no elements.
        return tuple(o for o in outputs if o.numel())

    assert torch.autograd.gradcheck(call, [arguments[n].detach().requires_grad_() for n in names])


def is_sequence(name: str, arguments: Arguments, sequences: Sequence[str], steps: tuple[int, int]) -> bool:
    x = arguments.get(name)
    return name in sequences and isinstance(x, Tensor) and x.ndim >= 2 and tuple(x.shape[:2]) == steps


def steps_of(arguments: Arguments, sequences: Sequence[str]) -> tuple[int, int]:
    return tuple(arguments[sequences[0]].shape[:2])


def _over_sequences(arguments: Arguments, sequences: Sequence[str], cut: Callable[[Tensor], Tensor]) -> Arguments:
    steps = steps_of(arguments, sequences)
    return {n: cut(a) if is_sequence(n, arguments, sequences, steps) else a for n, a in arguments.items()}


def mirrored(function: Function, sequences: Sequence[str]) -> Function:
    """`function` with time turned round, in its sequences and in all its outputs but the state, which comes last."""

    def call(**arguments: Any) -> tuple[Tensor, ...]:
        *outputs, state = function(**_over_sequences(arguments, sequences, lambda x: x.flip(1)))
        return (*(o.flip(1) for o in outputs), state)

    return call


def splits(
    function: Function,
    arguments: Arguments,
    sequences: Sequence[str],
    lengths: Sequence[int],
    *,
    backward: bool = True,
    whole: Function | None = None,
) -> None:
    """Law 2: pieces of `lengths`, each started with the state of the one before, are the whole, gradients too.

    `whole` computes the whole where `function` takes pieces only.
    """

    def in_pieces(**whole: Any) -> tuple[Tensor, ...]:
        state, outputs, start = whole.get("initial_state"), [], 0
        for length in lengths:
            piece = _over_sequences(whole, sequences, lambda x, a=start, n=length: x[:, a : a + n])
            *output, state = function(**(piece | {"initial_state": state}))
            outputs.append(output)
            start += length
        return (*(torch.cat(o, dim=1) for o in zip(*outputs, strict=True)), state)

    assert sum(lengths) == steps_of(arguments, sequences)[1]
    truth = results(whole or function, arguments, backward=backward)
    assert_equal(results(in_pieces, arguments, backward=backward), truth)


def _alone(function: Function, sequences: Sequence[str], lengths: Sequence[int], has_state: bool) -> Function:
    """A packed call as one call per sequence."""

    def call(*, cu_seqlens: Tensor, **packed: Any) -> tuple[Tensor, ...]:
        state, outputs, start = packed.get("initial_state"), [], 0
        for i, length in enumerate(lengths):
            one = _over_sequences(packed, sequences, lambda x, a=start, n=length: x[:, a : a + n])
            if state is not None:
                one["initial_state"] = state[i : i + 1]
            output = function(**one)
            outputs.append(output if isinstance(output, tuple) else (output,))
            start += length
        joined = list(zip(*outputs, strict=True))
        states = [torch.cat(joined.pop(), dim=0)] if has_state else []
        return (*(torch.cat(o, dim=1) for o in joined), *states)

    return call


def packs(
    function: Function,
    arguments: Arguments,
    sequences: Sequence[str],
    lengths: Sequence[int],
    *,
    has_state: bool,
    backward: bool = True,
) -> None:
    """Law 3: packed sequences give what each gives alone, and no gradient crosses a border."""
    truth = results(_alone(function, sequences, lengths, has_state), arguments, backward=backward)
    assert_equal(results(function, arguments, backward=backward), truth)
    if backward:
        _no_gradient_crosses(function, arguments, sequences, lengths, has_state)


def _no_gradient_crosses(function, arguments, sequences, lengths, has_state) -> None:
    # Only the second sequence is in the loss: the others' inputs must get no gradient at all.
    start, stop = lengths[0], lengths[0] + lengths[1]
    weights = weights_for(results(function, arguments, backward=False).outputs, 0)
    for i, w in enumerate(weights):
        inside = torch.zeros_like(w, dtype=torch.bool)
        if has_state and i == len(weights) - 1:
            inside[1] = True
        else:
            inside[:, start:stop] = True
        w.masked_fill_(~inside, 0)
    steps = steps_of(arguments, sequences)
    for name, g in results(function, arguments, weights=weights).gradients.items():
        if name == "initial_state":
            outside = torch.cat([g[:1], g[2:]])
        elif is_sequence(name, arguments, sequences, steps):
            outside = torch.cat([g[:, :start], g[:, stop:]], dim=1)
        else:
            continue
        worst = outside.abs().max().item() if outside.numel() else 0.0
        assert worst <= BLEED, f"a gradient of {worst:.1e} with respect to {name} crosses a border"


def rows_are_independent(
    function: Function, arguments: Arguments, sequences: Sequence[str], *, backward: bool = True
) -> None:
    """Law 5: each batch row gives what it gives alone."""
    batch = steps_of(arguments, sequences)[0]

    def row_by_row(**whole: Any) -> tuple[Tensor, ...]:
        outputs = []
        for i in range(batch):
            row = _over_sequences(whole, sequences, lambda x, i=i: x[i : i + 1])
            if row.get("initial_state") is not None:
                row["initial_state"] = row["initial_state"][i : i + 1]
            output = function(**row)
            outputs.append(output if isinstance(output, tuple) else (output,))
        return tuple(torch.cat(o) for o in zip(*outputs, strict=True))

    truth = results(row_by_row, arguments, backward=backward)
    assert_equal(results(function, arguments, backward=backward), truth)


def repeats(function: Function, arguments: Arguments, *, backward: bool = True) -> None:
    """Law 5: twice in a row is equal to the bit."""
    first, second = (results(function, arguments, backward=backward).named() for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name} differs from one call to the next"


def leaves_the_state(
    function: Function, arguments: Arguments, *, has_state: bool, counts: int = 0, backward: bool = True
) -> None:
    """Without tokens there are no outputs, and the state is the initial one, zeros where there is none.

    Gradients are those of the state, and zeros for all else and for the state's last entries that are `counts`.
    """
    state = arguments.get("initial_state")
    weights = weights_for(results(function, arguments, backward=False).outputs, 0)
    found = results(function, arguments, weights=weights, backward=backward)
    outputs = found.outputs[:-1] if has_state else found.outputs
    for output in outputs:
        assert output.numel() == 0, f"an output without tokens has shape {tuple(output.shape)}"
    if has_state:
        truth = torch.zeros_like(found.outputs[-1]) if state is None else state
        assert torch.equal(found.outputs[-1], truth), "a call without tokens changes the state"
    for name, g in found.gradients.items():
        truth = torch.zeros_like(g)
        if name == "initial_state":
            carried = g.shape[-1] - counts
            truth[..., :carried] = weights[-1].conj()[..., :carried]
        assert torch.equal(g, truth), f"the gradient of {name} is wrong in a call without tokens"


def is_causal(function: Function, arguments: Arguments, sequences: Sequence[str], at: int) -> None:
    """Law 4: the outputs before step `at` have no gradient with respect to the inputs from `at` on."""
    steps = steps_of(arguments, sequences)
    outputs = results(function, arguments, backward=False).outputs
    weights = [torch.zeros_like(o) for o in outputs]
    for o, w in zip(outputs, weights, strict=True):
        if tuple(o.shape[:2]) == steps:
            w[:, :at] = 1
    for name, g in results(function, arguments, weights=weights).gradients.items():
        if is_sequence(name, arguments, sequences, steps):
            worst = g[:, at:].abs().max().item()
            assert worst <= BLEED, f"a gradient of {worst:.1e} reaches back from {name} after step {at}"


def keeps_precision(function: Function, reference: Function, arguments: Arguments) -> None:
    """Law 7: in bfloat16 the error is at most twice that of rounding the inputs and the results."""
    dtype = torch.bfloat16
    truth = results(reference, arguments)
    weights = [to(w, dtype) for w in weights_for(truth.outputs, 0)]
    rounded = cast(arguments, dtype)
    wide = [to(w, torch.float64) for w in weights]
    exact = results(reference, cast(rounded, torch.float64), weights=wide)
    found = results(function, rounded)
    plain = exact.to(dtype).named()
    for name, x in found.named().items():
        excess = low_precision_excess(x, plain[name], truth.named()[name])
        assert excess <= 1, f"{name}: in bfloat16 the error is {excess:.2f} times what is allowed"


def keeps_wide_what_is_wide(
    function: Function, reference: Function, arguments: Arguments, wide: Sequence[str], *, backward: bool
) -> None:
    """Law 7: of inputs in bfloat16 float32 states, and gradients of float32 arguments, are right to float32.

    Args:
        wide: arguments that are in float32.
    """
    rounded = cast(arguments, torch.bfloat16)
    rounded |= cast({name: arguments[name] for name in wide if name in arguments}, torch.float32)
    found = results(function, rounded, backward=backward)
    weights = [to(w, torch.float64) for w in weights_for(found.outputs, 0)]
    truth = results(reference, cast(rounded, torch.float64), weights=weights, backward=backward).named()
    for name, x in found.named().items():
        if x.dtype in (torch.float32, torch.complex64):
            assert error(x, truth[name]) < FLOAT32_TOLERANCE, f"{name}: an error of {error(x, truth[name]):.1e}"


@dataclass(frozen=True, kw_only=True)
class ExtremeDraw(Draw):
    """Inputs a hundred times as large, and decays that forget everything, nothing, or next to nothing."""

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return Draw.normal(self, *shape, scale=100 * scale)

    def complex_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return Draw.complex_normal(self, *shape, scale=100 * scale)

    def log_decay(self, *shape: int, scale: float = 1.0) -> Tensor:
        levels = torch.tensor([0.0, -1e-4, -1.0, -1e4], dtype=torch.float64)
        return self._on_device(levels[torch.randint(4, shape, generator=self.generator)])


def stays_finite(function: Function, case: Case, time: int, dtype: torch.dtype, *, backward: bool) -> None:
    """Law 7: nothing overflows at extreme inputs."""
    draw = ExtremeDraw(generator=torch.Generator().manual_seed(5), dtype=dtype)
    for name, x in results(function, arguments_of(case, draw, 1, time), backward=backward).named().items():
        assert x.isfinite().all(), f"{name} is not finite in {dtype} at {time} steps"


def compiles(function: Function, arguments: Arguments) -> None:
    """Law 8: torch.compile takes it whole, forward and backward, and changes nothing."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, arguments), results(function, arguments))


class _CustomOps(TorchDispatchMode):
    """Records the calls of our custom ops."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "omnimix":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def custom_ops_are_sound(function: Function, arguments: Arguments, checks: Sequence[str]) -> None:
    """Law 8: `checks` of torch.library.opcheck accept every custom op that a call and its backward run."""
    with _CustomOps() as forward:
        results(function, arguments, backward=False)
    with _CustomOps() as both:
        results(function, arguments)
    for i, (op, args, kwargs) in enumerate(both.calls):
        # Only the ops of the forward pass are differentiated.
        wanted = i < len(forward.calls)

        def leaf(x: Any, wanted: bool = wanted) -> Any:
            floating = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
            return x.detach().clone().requires_grad_(wanted) if floating else x

        kwargs = {name: leaf(x) for name, x in kwargs.items()}
        try:
            torch.library.opcheck(op, tuple(map(leaf, args)), kwargs, test_utils=checks)
        except OpCheckError as found:
            # It differentiates every output; those of cross_entropy that are gradients refuse, and say so.
            if "omnimix.cross_entropy's gradients have no derivative" not in str(found):
                raise
