"""Calls of every op with arguments that nobody meant: each ends in the reference's result or in an error of ours.

Tensors lie in larger ones that hold NaN, so that what reads beside them gives NaN, and what writes there is seen.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimix.cli.check_kernels import arguments_of, call_of, differentiable, to
from omnimix.errors import OmnimixError
from omnimix.kernels import Draw, Op, ops
from omnimix.kernels.registry import complex_of

CALLS = 140
# Relative to the largest true element, or 1.
TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.2, torch.float32: 1e-3, torch.float64: 1e-9}
SPARE = {True: math.nan, False: -7777}
HUGE = 1 << 41
OPTIONS = (-1, 0, 1, 2, 7, 2**31, 2**62, 2**70, -(2**63), 0.5, -0.5, math.nan, math.inf, -math.inf, "x", None, True)


class Memory:
    """Where the tensors of a call lie, and what lay around them before it."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.kept: list[tuple[Tensor, Tensor]] = []

    def place(self, x: Tensor) -> Tensor:
        """The same values with dimensions in any order, gaps between them and something before and after."""
        order = list(range(x.ndim))
        if self.rng.random() < 0.5:
            self.rng.shuffle(order)
        strides, reach = [1] * x.ndim, 1
        for dim in reversed(order):
            strides[dim] = reach * self.rng.choice((1, 1, 1, 2, 3))
            reach = strides[dim] * max(1, x.shape[dim])
        # Addresses are of any alignment that the dtype allows.
        before, fill = self.rng.choice((0, 1, 3, 16)), SPARE[x.is_floating_point() or x.is_complex()]
        storage = torch.full((before + reach + 16,), fill, dtype=x.dtype)
        placed = storage.as_strided(x.shape, strides, before)
        placed.copy_(x)
        self.kept.append((storage, storage.clone()))
        return placed

    def changed(self) -> bool:
        return any(not torch.equal(now.view(torch.uint8), then.view(torch.uint8)) for now, then in self.kept)


def expanded(x: Tensor, rng: random.Random) -> Tensor:
    dim = rng.randrange(x.ndim) if x.ndim else 0
    return x.narrow(dim, 0, 1).expand(x.shape) if x.ndim and x.shape[dim] else x


def flipped(x: Tensor, rng: random.Random) -> Tensor:
    return x.flip(rng.randrange(x.ndim)) if x.ndim else x


def negated(x: Tensor, rng: random.Random) -> Tensor:
    """A lazy negation, which no address tells of."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


def narrowed(x: Tensor, rng: random.Random) -> Tensor:
    return to(x, rng.choice((torch.float16, torch.bfloat16, torch.float32)))


def resized(x: Tensor, rng: random.Random) -> Tensor:
    if not x.ndim:
        return x
    dim = rng.randrange(x.ndim)
    return x.narrow(dim, 0, rng.randrange(x.shape[dim] + 1)) if rng.random() < 0.5 else torch.cat([x, x], dim)


def reshaped(x: Tensor, rng: random.Random) -> Tensor:
    how = rng.randrange(4)
    if how == 0 or not x.ndim:
        return x.unsqueeze(rng.randrange(x.ndim + 1))
    if how == 1:
        return x.flatten()
    return x.select(rng.randrange(x.ndim), 0) if how == 2 and x.numel() else x.movedim(0, -1)


def retyped(x: Tensor, rng: random.Random) -> Tensor:
    kinds = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float32, torch.float8_e4m3fn)
    wanted = rng.choice(kinds)
    return x if x.is_complex() and not wanted.is_complex else x.to(wanted)


def moved(x: Tensor, rng: random.Random) -> Tensor:
    return x.to("meta")


def huge(x: Tensor, rng: random.Random) -> Tensor:
    dims = [d for d in range(x.ndim) if x.shape[d]]
    if not dims:
        return x
    dim = rng.choice(dims)
    return x.narrow(dim, 0, 1).expand(*x.shape[:dim], HUGE, *x.shape[dim + 1 :])


def sparse(x: Tensor, rng: random.Random) -> Tensor:
    return x.to_sparse()


def other(x: Tensor, rng: random.Random) -> Any:
    return rng.choice((None, [1.0], 1.0, "x", torch.nn.Parameter(x.detach()) if x.is_floating_point() else None))


SAME: tuple[Callable, ...] = (expanded, flipped, negated, narrowed)
WRONG: tuple[Callable, ...] = (resized, reshaped, retyped, moved, huge, sparse, other)


def drawn(op: Op, rng: random.Random, number: int) -> tuple[dict[str, Any], Memory, list[str]]:
    """The arguments of a call, where they lie, and what was done to them."""
    case, said, memory = rng.choice(op.cases()), [], Memory(rng)
    batch, time, lengths = rng.choice((1, 1, 2, 3, 0)), rng.choice((0, 1, 1, 2, 5, 9, 33)), None
    if case.packed and op.sequences and rng.random() < 0.3:
        batch, lengths = 1, [rng.choice((0, 1, 2, 5)) for _ in range(rng.randrange(4))]
        time = sum(lengths)
    arguments = arguments_of(case, Draw.seeded(number), batch, time, state=rng.random() < 0.5, lengths=lengths)
    said.append(f"{case.name}: batch {batch}, {time} steps, lengths {lengths}")
    tensors = [name for name, a in arguments.items() if isinstance(a, Tensor)]
    floats = differentiable(arguments)
    for _ in range(rng.randrange(3)):
        name, change = rng.choice(floats), rng.choice(SAME)
        arguments[name] = change(arguments[name], rng)
        said.append(f"{name} {change.__name__}")
    for name in tensors:
        # A lazy negation is made of a tensor, and would be none in other memory.
        if rng.random() < 0.7 and not arguments[name].is_neg():
            arguments[name] = memory.place(arguments[name])
    if rng.random() < 0.5:
        said += wrong(arguments, tensors, op, rng)
    return arguments, memory, said


def wrong(arguments: dict[str, Any], tensors: list[str], op: Op, rng: random.Random) -> list[str]:
    """Changes an argument to what it should not be, or may not be."""
    known = op.complete(arguments)
    options = [name for name, value in known.items() if not isinstance(value, Tensor) and name not in optional(op)]
    if options and rng.random() < 0.3:
        name = rng.choice(options)
        arguments[name] = rng.choice(OPTIONS)
        return [f"{name} = {arguments[name]!r}"]
    if "cu_seqlens" in known and rng.random() < 0.2:
        edges = [rng.choice((0, 1, 2, 5, 9, -1, 2**31 - 1)) for _ in range(rng.randrange(5))]
        arguments["cu_seqlens"] = torch.tensor(edges, dtype=rng.choice((torch.int32, torch.int64)))
        return [f"cu_seqlens = {edges}"]
    name, change = rng.choice(tensors), rng.choice(WRONG)
    arguments[name] = change(arguments[name], rng)
    return [f"{name} {change.__name__}"]


def optional(op: Op) -> set[str]:
    return {argument.name for argument in op.tensors}


def reference_of(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the definition gives for the same values in float64."""

    def wide(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        return to(x, torch.float64) if x.is_floating_point() or x.is_complex() else x

    outputs = call_of(op, "reference")(**{name: wide(x) for name, x in arguments.items()})
    return outputs if isinstance(outputs, tuple) else (outputs,)


def coarsest(arguments: dict[str, Any], outputs: tuple[Tensor, ...]) -> float:
    floats = [x.dtype for x in (*arguments.values(), *outputs) if isinstance(x, Tensor)]
    return max(TOLERANCES.get(d if not d.is_complex else d.to_real(), 0.0) for d in floats)


def differs(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> bool:
    for one, right in zip(found, truth, strict=True):
        if one.shape != right.shape:
            return True
        right = right.to(complex_of(torch.float64)) if one.is_complex() else right
        if right.numel() and right.abs().max().isfinite() and right.abs().max() < 1e3:
            deviation = (one.detach().to(right.dtype) - right).abs().max()
            if not deviation <= tolerance * max(1.0, float(right.abs().max())):
                return True
    return False


def outcome(op: Op, backend: str, arguments: dict[str, Any], rng: random.Random) -> str:
    """ "right", "refused", or what is wrong."""
    train = rng.random() < 0.4
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.is_floating_point() and a.is_leaf]
    if train:
        for leaf in leaves:
            leaf.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(train):
            outputs = call_of(op, backend)(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanting = [o for o in outputs if o.requires_grad and o.is_floating_point()]
        if train and wanting:
            gradients = torch.autograd.grad(sum(o.double().sum() for o in wanting), leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None and gradient.shape != leaf.shape:
                    return f"a gradient of shape {tuple(gradient.shape)} for {tuple(leaf.shape)}"
    except OmnimixError:
        return "refused"
    except Exception as error:
        return f"a foreign {type(error).__name__}: {error}"
    if any(o.device.type == "meta" for o in outputs):
        return "right"
    truth = reference_of(op, arguments)
    return "another result" if differs(outputs, truth, coarsest(arguments, outputs)) else "right"


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_every_call_ends_in_the_right_result_or_an_error_of_ours(op, without_shape_checks):
    rng, faults, seen = random.Random(op.name), [], Counter()
    backends = ["auto", "auto", *(b.name for b in op.backends if b.name != "triton")]
    for number in range(CALLS):
        arguments, memory, said = drawn(op, rng, number)
        backend = rng.choice(backends)
        ended = outcome(op, backend, arguments, rng)
        if memory.changed():
            ended = "it wrote into its arguments, or beside them"
        seen[ended] += 1
        if ended not in ("right", "refused"):
            faults.append(f"{backend}: {'; '.join(said)}: {ended}")
    assert not faults, f"{len(faults)} of {CALLS} calls:\n" + "\n".join(faults[:20])
    # Neither is everything refused, nor everything served.
    assert min(seen["right"], seen["refused"]) > CALLS // 8, seen
