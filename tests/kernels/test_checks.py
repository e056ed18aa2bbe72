"""The door of every op: each tensor that it cannot serve is refused by name, before any backend runs."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import Draw, cross_entropy, norm, ops, selective_scan, short_conv
from omnimix.kernels.common.checks import check_flag, check_real, check_whole
from omnimix.kernels.registry import Op

ARGUMENTS = [pytest.param(op, a, id=f"{op.name}-{a.name}") for op in ops() for a in op.tensors]


def call_with(op: Op, name: str) -> dict:
    """Arguments of a call that has the one called `name`."""
    for case in op.cases():
        arguments = case.make(Draw.seeded(), 1, 6)
        if case.state is not None:
            arguments["initial_state"] = case.state(Draw.seeded(), 1)
        if name == "cu_seqlens":
            arguments["cu_seqlens"] = torch.tensor([0, 6])
        if isinstance(arguments.get(name), Tensor):
            return arguments
    if name in ("q_positions", "k_positions"):
        return arguments | {name: torch.arange(6)[None]}
    raise AssertionError(f"{op.name}: no case has {name}")


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_every_tensor_of_the_signature_is_declared(op):
    known = list(inspect.signature(op.function).parameters.values())
    tensors = [p for p in known if "Tensor" in str(p.annotation)]
    assert {a.name for a in op.tensors} == {p.name for p in tensors}
    assert {a.name for a in op.tensors if a.optional} == {p.name for p in tensors if p.default is None}


@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
def test_what_is_not_served_is_refused_by_name(op, argument, without_shape_checks):
    arguments = call_with(op, argument.name)
    x = arguments[argument.name]
    wrong = [x.to("meta"), x.bool(), x.to(torch.int16), x.to(torch.complex32), x.to_sparse(), x.tolist()]
    wrong += [] if x.ndim + 1 in argument.ranks else [x[..., None]]
    wrong += [] if x.is_floating_point() or x.is_complex() else [x.double()]
    wrong += [] if argument.optional else [None]
    wrong += [x.narrow(0, 0, 1).expand(1 << 41, *x.shape[1:])] if x.ndim else []
    for given in wrong:
        kind = (given.dtype, given.shape, given.device, given.layout) if isinstance(given, Tensor) else type(given)
        # Where the first tensor lies elsewhere, all others do.
        named = rf"^({'|'.join(a.name for a in op.tensors)}): " if argument is op.tensors[0] else f"^{argument.name}: "
        with pytest.raises(UnsupportedShape, match=named):
            op.function(**arguments | {argument.name: given})
            pytest.fail(f"{kind} was served")


def test_weights_of_one_dimension_too_many_are_refused(without_shape_checks):
    """The first read outside of its memory, the second gave other numbers without a word."""
    x, B = torch.randn(1, 4, 6), torch.randn(1, 4, 1, 3)
    with pytest.raises(UnsupportedShape, match=r"^A: shape \(6, 3, 1\) has 3 dimensions; selective_scan takes 2"):
        selective_scan(x, x, -torch.ones(6, 3, 1), B, B)
    with pytest.raises(UnsupportedShape, match=r"^weight: shape \(6, 1, 4\) has 3 dimensions; short_conv takes 2"):
        short_conv(x, torch.randn(6, 1, 4))


def test_a_call_for_which_there_is_no_memory_says_so(without_shape_checks):
    x = torch.ones(1, 1, 1).expand(1, 1 << 20, 1 << 20)
    with pytest.raises(BackendUnavailable, match="norm: this call needs more memory than there is"):
        norm(x, weight=None, backend="chunked")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 2**70, "1", None, True])
def test_numbers_that_are_none(value, without_shape_checks):
    x, weight, target = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UnsupportedShape, match="^eps: "):
        norm(x, eps=value)
    with pytest.raises(UnsupportedShape, match="^z_loss: "):
        cross_entropy(x, weight, target, z_loss=value)
    for check, known in ((check_real, {"least": 0}), (check_whole, {"least": 0})):
        with pytest.raises(UnsupportedShape, match="^it: "):
            check("it", value, **known)
    if value is not True:
        with pytest.raises(UnsupportedShape, match="^it: "):
            check_flag("it", value)


def test_numbers_that_are_some():
    check_real("it", 0, least=0)
    check_real("it", -1e300)
    check_real("it", None, optional=True)
    check_whole("it", 2**62)
    check_whole("it", None, optional=True)
    check_flag("it", False)
