"""Derivatives beyond the first of one call: each is right, or an error of ours that names the op and the remedy."""

from __future__ import annotations

import pytest
import torch

from omnimix.backbones import Backbone, BackboneConfig, Layout
from omnimix.cli.check_kernels import call_of, differentiable
from omnimix.errors import UnsupportedCall
from omnimix.kernels import Draw, gated_linear, native, norm, ops, using

# Their derivatives are torch's own: SDPA on CPUs has no second one, and says so itself.
OURS = [op for op in ops() if op.name != "attention"]
CALLS = [
    pytest.param(op, backend.name, id=f"{op.name}-{backend.name}")
    for op in ops()
    for backend in op.backends
    if backend.name in ("native", "chunked")
]


def given(op, backend):
    """A loss of the op's floating-point arguments, and these; None where the backend computes no gradients."""
    case = op.cases()[0]
    arguments = case.make(Draw.seeded(), 2, 3)
    if case.state is not None:
        arguments["initial_state"] = case.state(Draw.seeded(1), 2)
    names = differentiable(arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    if op.backend(backend).limits(op.complete(arguments | leaves)) is not None:
        pytest.skip("it computes no gradients")
    call = call_of(op, backend)

    def loss(*tensors):
        outputs = call(**arguments | dict(zip(names, tensors, strict=True)))
        return sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return loss, [arguments[name] for name in names]


def gradients(loss, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


@pytest.mark.parametrize(("op", "backend"), CALLS)
def test_torch_func_differentiates_and_maps(op, backend, without_shape_checks):
    loss, tensors = given(op, backend)
    every = tuple(range(len(tensors)))
    for found, right in zip(torch.func.grad(loss, every)(*tensors), gradients(loss, tensors), strict=True):
        torch.testing.assert_close(found, right)
    halves = [t / 2 for t in tensors]
    stacked = [torch.stack([t, half]) for t, half in zip(tensors, halves, strict=True)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stacked)[1], loss(*halves))
    by_sample = torch.func.vmap(torch.func.grad(loss, every))(*stacked)
    for found, right in zip(by_sample, gradients(loss, halves), strict=True):
        torch.testing.assert_close(found[1], right)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_no_samples_have_results_of_no_samples(backend, without_shape_checks):
    if backend == "native" and native.machine_refusal() is not None:
        pytest.skip(native.machine_refusal())
    x, q, v = torch.zeros(0, 3, 4), torch.zeros(0, 1, 3, 2, 4), torch.zeros(0, 1, 3, 2, 5)

    def normed(x):
        return norm(x, backend=backend)

    def mixed(q, v):
        return gated_linear(q, q, v, backend=backend)

    assert torch.func.vmap(normed)(x).shape == x.shape
    assert [out.shape for out in torch.func.vmap(mixed)(q, v)] == [v.shape, (0, 1, 2, 4, 5)]
    assert torch.func.vmap(torch.func.grad(lambda x: normed(x).square().sum()))(x).shape == x.shape
    assert torch.func.vmap(torch.func.grad(lambda q, v: mixed(q, v)[0].square().sum()))(q, v).shape == q.shape


@pytest.mark.parametrize(("op", "backend"), [c for c in CALLS if c.values[0] in OURS])
def test_a_second_derivative_is_right_or_refused(op, backend, without_shape_checks):
    loss, tensors = given(op, backend)

    def twice(loss):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(total, leaves, allow_unused=True)

    try:
        found = twice(loss)
    except UnsupportedCall as error:
        assert op.name in str(error) and "using('reference')" in str(error)
        return
    for one, right in zip(found, twice(given(op, "reference")[0]), strict=True):
        assert (one is None) == (right is None)
        if one is not None:
            torch.testing.assert_close(one, right)


def test_what_the_error_names_serves():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    with using("reference"):
        assert torch.autograd.gradgradcheck(norm, (x,))


@pytest.mark.parametrize(("op", "backend"), [c for c in CALLS if c.values[0] in OURS])
def test_a_forward_derivative_is_right_or_refused(op, backend, without_shape_checks):
    loss, tensors = given(op, backend)
    ones = [torch.ones_like(t) for t in tensors]
    try:
        _, found = torch.func.jvp(loss, tuple(tensors), tuple(ones))
    except UnsupportedCall as error:
        assert op.name in str(error)
        return
    right = sum((g * one).sum() for g, one in zip(gradients(loss, tensors), ones, strict=True))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("ffn", ["moe", "swiglu"])
def test_gradients_of_single_samples_of_a_backbone(ffn, without_shape_checks):
    net = Backbone(BackboneConfig(dim=16, depth=1, pattern=["gla"], ffn=ffn)).double().eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.randn(3, 5, 16, dtype=torch.float64)

    def loss(parameters, row):
        out = torch.func.functional_call(net, parameters, (row[None], Layout(causal=True)))
        return out.y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    net(x[1:2], Layout(causal=True)).y.square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name][1], torch.zeros_like(p) if p.grad is None else p.grad)
