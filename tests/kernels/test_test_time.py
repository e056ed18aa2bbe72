"""test_time: what TTT's paper says of it, combinations that the laws leave out, its state, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimix.cli.check_kernels import error
from omnimix.errors import UnsupportedShape
from omnimix.kernels import test_time as train
from omnimix.kernels.test_time import state_parts, state_size

from ..laws import checker


def tensors(b=2, t=11, h=2, k=4, m=None, *, momentum=False, decay=False):
    out = k if m is None else m
    made = {name: torch.randn(b, t, h, k) for name in ("q", "k", "v")}
    made |= {"lr": torch.rand(b, t, h) * 0.1, "w1": torch.randn(h, k, out) * 0.5, "b1": torch.randn(h, out) * 0.1}
    made |= {"norm_weight": torch.rand(h, k) + 0.5, "norm_bias": torch.randn(h, k) * 0.1}
    made |= {} if m is None else {"w2": torch.randn(h, m, k) * 0.5, "b2": torch.randn(h, k) * 0.1}
    made |= {"momentum": torch.rand(b, t, h) * 0.8} if momentum else {}
    made |= {"decay": -torch.rand(b, t, h)} if decay else {}
    return {name: x.double() for name, x in made.items()} | {"chunk": 4, "eps": 0.01}


def by_backend(name):
    return lambda **arguments: train(**arguments, backend=name)


@pytest.mark.parametrize(
    ("m", "momentum", "decay", "chunk"),
    [
        (None, False, True, 3),
        (None, True, False, 5),
        (3, False, False, 4),
        (3, False, True, 3),
        (5, True, True, 4),
        (3, True, True, 1),
    ],
)
def test_every_combination_agrees_with_the_definition(m, momentum, decay, chunk):
    arguments = tensors(m=m, momentum=momentum, decay=decay) | {"chunk": chunk}
    checker.agrees(by_backend("chunked"), by_backend("reference"), arguments)
    _, state = train(**arguments)
    checker.agrees(by_backend("chunked"), by_backend("reference"), arguments | {"initial_state": state})


@pytest.mark.parametrize("m", [None, 6])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_inner_gradient_is_autograds(m, backend):
    """One mini-batch of TTT: W = W0 - η Σ ∇ℓ(W0; x_i), arXiv 2407.04620, eq. 7."""
    given = tensors(b=1, t=4, h=1, m=m)
    names = ["w1", "b1"] + ([] if m is None else ["w2", "b2"])
    weights = {name: given[name][0].clone().requires_grad_() for name in names}

    def model(x, weights):
        z = x @ weights["w1"] + weights["b1"]
        if m is not None:
            z = F.gelu(z) @ weights["w2"] + weights["b2"]
        return x + F.layer_norm(z, z.shape[-1:], given["norm_weight"][0], given["norm_bias"][0], given["eps"])

    losses = 0.5 * (model(given["k"][0, :, 0], weights) - given["v"][0, :, 0]).square().sum(-1)
    steps = torch.autograd.grad((losses * given["lr"][0, :, 0]).sum(), list(weights.values()))
    trained = {name: w.detach() - step for (name, w), step in zip(weights.items(), steps, strict=True)}
    o, state = train(**given, backend=backend)
    assert error(o[0, -1, 0], model(given["q"][0, -1, 0], trained)) < 1e-9
    now = state_parts(state, 4, m)["now"][0, 0]
    assert error(now, torch.cat([(trained[n] - weights[n]).detach().flatten() for n in names])) < 1e-9


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_titans_with_mini_batches_of_one_token(backend):
    """M_t = (1 - α) M_{t-1} + S_t, S_t = η S_{t-1} - θ ∇ℓ(M_{t-1}; x_t), arXiv 2501.00663, eq. 13 and 14."""
    given = tensors(b=1, t=6, h=1, momentum=True, decay=True) | {"chunk": 1}
    weight, bias = given["w1"][0], given["b1"][0]
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    norm = given["norm_weight"][0], given["norm_bias"][0], given["eps"]
    o, _ = train(**given, backend=backend)

    def model(x, weight, bias):
        z = x @ weight + bias
        return x + F.layer_norm(z, z.shape, *norm)

    for i in range(6):
        leaves = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
        loss = 0.5 * (model(given["k"][0, i, 0], *leaves) - given["v"][0, i, 0]).square().sum()
        steps = torch.autograd.grad(loss, leaves)
        eta, theta, keep = given["momentum"][0, i, 0], given["lr"][0, i, 0], given["decay"][0, i, 0].exp()
        momenta = [eta * s - theta * g for s, g in zip(momenta, steps, strict=True)]
        weight, bias = (keep * w + s for w, s in zip((weight, bias), momenta, strict=True))
        assert error(o[0, i, 0], model(given["q"][0, i, 0], weight, bias)) < 1e-9


def test_the_state_says_what_it_holds():
    given = tensors(momentum=True)
    _, state = train(**given)
    assert state.shape == (2, 2, state_size(4, momentum=True))
    parts = state_parts(state, 4, momentum=True)
    assert (parts["place"] == 11 % 4).all()
    _, at_the_border = train(**given | {"chunk": 11})
    parts = state_parts(at_the_border, 4, momentum=True)
    assert torch.equal(parts["start"], parts["now"]) and (parts["place"] == 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"v": torch.randn(2, 11, 2, 5)}, "must have one shape"),
        ({"chunk": 0}, "chunk: 0"),
        ({"w1": torch.randn(2, 4, 5)}, "w1"),
        ({"w2": torch.randn(2, 4, 4)}, "pass both or neither"),
        ({"w2": torch.randn(2, 5, 4), "b2": torch.randn(2, 4)}, "w2"),
        ({"w2": torch.randn(2, 4, 4), "b2": torch.randn(2, 5)}, "b2"),
        ({"lr": torch.randn(2, 11)}, "lr"),
        ({"b1": torch.randn(2, 5)}, "b1"),
        ({"momentum": torch.randn(2, 11, 3)}, "momentum"),
        ({"norm_bias": torch.randn(4)}, "norm_bias"),
        ({"initial_state": torch.randn(2, 2, 9)}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 11])}, "batch 1"),
    ],
)
def test_bad_calls_name_the_argument(change, named, without_shape_checks):
    with pytest.raises(UnsupportedShape, match=named):
        train(**(tensors() | change))
