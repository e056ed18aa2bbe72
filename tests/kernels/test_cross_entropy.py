"""cross_entropy: what the laws do not say about it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omnimix.cli.check_kernels import results
from omnimix.errors import UnknownName, UnsupportedShape
from omnimix.kernels import cross_entropy
from omnimix.kernels.cross_entropy import passes

from ..laws.checker import agrees

BACKENDS = ["reference", "chunked", "triton"]

# What a process needs for the loss and its gradients beyond its inputs: its largest resident set after, minus before.
# (getrusage would count the parent's, from before the program was started.)
MEMORY = """
import sys, torch
import torch.nn.functional as F
from omnimix.kernels import cross_entropy

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

way, sizes = sys.argv[4], [int(size) for size in sys.argv[1:4]]
for n, v, d in ((2, 3, 4), sizes):  # the first call imports much
    x = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    target = torch.randint(v, (n,))
    before = peak()
    loss = F.cross_entropy(F.linear(x, weight), target) if way == "plain" else cross_entropy(x, weight, target)
    loss.backward()
print(peak() - before)
"""


def given(n=40, d=6, v=50, dtype=torch.float64):
    target = torch.randint(v, (n,))
    target[::7] = -100
    return {"x": torch.randn(n, d, dtype=dtype), "weight": torch.randn(v, d, dtype=dtype), "target": target}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(backend, reduction):
    def plain(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction, label_smoothing=0.2)

    def ours(**arguments):
        return cross_entropy(**arguments, reduction=reduction, label_smoothing=0.2, backend=backend)

    agrees(ours, plain, given())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_may_run_inside_autocast(reduction):
    inputs, found = given(dtype=torch.float32), []
    for inside in (False, True):
        x, weight = (inputs[name].clone().requires_grad_() for name in ("x", "weight"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(x, weight, inputs["target"], reduction=reduction).mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append((x.grad, weight.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_chunks_are_one(backend, reduction, monkeypatch):
    monkeypatch.setitem(passes.ELEMENTS, "cpu", 1)
    monkeypatch.setattr(passes, "FEWEST_ROWS", 9)
    options = {"reduction": reduction, "z_loss": 0.1, "softcap": 5.0, "bias": torch.randn(50, dtype=torch.float64)}
    agrees(
        lambda **a: cross_entropy(**a, **options, backend=backend),
        lambda **a: cross_entropy(**a, **options, backend="reference"),
        given(),
    )


@pytest.mark.triton
def test_more_classes_than_a_triton_tile(monkeypatch):
    from importlib import import_module

    monkeypatch.setattr(import_module("omnimix.kernels.cross_entropy.triton"), "TILE", 16)
    agrees(
        lambda **a: cross_entropy(**a, label_smoothing=0.1, backend="triton"),
        lambda **a: cross_entropy(**a, label_smoothing=0.1, backend="reference"),
        given(n=3),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_even_logits_cost_the_logarithm_of_the_classes(backend):
    x, weight, target = torch.zeros(4, 3), torch.randn(8, 3), torch.arange(4)
    assert cross_entropy(x, weight, target, backend=backend).item() == pytest.approx(math.log(8))
    with_z = cross_entropy(x, weight, target, z_loss=0.5, reduction="sum", backend=backend)
    assert with_z.item() == pytest.approx(4 * (math.log(8) + 0.5 * math.log(8) ** 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_do_nothing(backend):
    arguments = given(dtype=torch.float32)
    kept = arguments["target"] >= 0
    x = arguments["x"].clone().requires_grad_()
    loss = cross_entropy(x, arguments["weight"], arguments["target"], backend=backend)
    alone = cross_entropy(x[kept], arguments["weight"], arguments["target"][kept], backend=backend)
    torch.testing.assert_close(loss, alone)
    (g,) = torch.autograd.grad(loss, x)
    assert g[~kept].abs().max() == 0 and g[kept].abs().amin(0).min() > 0
    nothing = cross_entropy(x, arguments["weight"], torch.full_like(arguments["target"], -100), backend=backend)
    assert nothing.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_differentiated(backend):
    for asked in ("x", "weight"):
        arguments = given()
        arguments[asked].requires_grad_()
        for reduction in ("mean", "none"):
            found, wanted = (
                torch.autograd.grad(
                    3 * cross_entropy(**arguments, reduction=reduction, backend=b).sum(), arguments[asked]
                )[0]
                for b in (backend, "reference")
            )
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_per_target_in_any_shape(backend):
    x, weight, target = torch.randn(2, 3, 6), torch.randn(5, 6), torch.randint(5, (2, 3))
    rows = cross_entropy(x, weight, target, reduction="none", backend=backend)
    wanted = F.cross_entropy((x @ weight.t()).flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(rows, wanted.view(2, 3))


def test_the_loss_of_bfloat16_is_float32():
    arguments = given(dtype=torch.bfloat16)
    found = results(lambda **a: cross_entropy(**a, backend="chunked"), arguments)
    assert found.outputs[0].dtype == torch.float32
    assert found.gradients["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_small_gradients_survive_float16(backend):
    # Of a mean over 20,000 rows, and 40 classes: below float16's smallest number until the loss is scaled.
    arguments = given(n=20_000, d=2, v=40, dtype=torch.float16)
    found, wanted = [], []
    for kind, dtype in ((found, torch.float16), (wanted, torch.float64)):
        x = arguments["x"].to(dtype).requires_grad_()
        weight = (arguments["weight"] * 0.01).to(dtype).requires_grad_()
        loss = cross_entropy(x, weight, arguments["target"], backend=backend if kind is found else "reference")
        kind.extend(g.double() for g in torch.autograd.grad(loss * 2.0**16, (x, weight)))
    for g, truth in zip(found, wanted, strict=True):
        assert (g - truth).norm() < 2e-3 * truth.norm()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_is_a_quarter_of_the_plain_way_or_less():
    def megabytes(way):
        command = [sys.executable, "-c", MEMORY, "4096", "16384", "64", way]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # 256 MB of logits, of which the plain way holds at least one more copy.
    plain = megabytes("plain")
    assert plain > 512
    assert megabytes("chunked") < plain / 4


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"weight": torch.ones(5, 4)}, UnsupportedShape, "weight: shape"),
        ({"weight": torch.ones(5, 3).double()}, UnsupportedShape, r"weight\.to\(torch.float32\)"),
        ({"weight": torch.ones(0, 3)}, UnsupportedShape, "empty"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, UnsupportedShape, "target: shape"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, UnsupportedShape, "int32"),
        ({"target": torch.tensor([0, 5])}, UnsupportedShape, "target: 5 is none of 5 classes"),
        ({"target": torch.tensor([0, -1])}, UnsupportedShape, "target: -1 is none of 5 classes"),
        ({"bias": torch.ones(4)}, UnsupportedShape, "bias"),
        ({"softcap": 0.0}, UnsupportedShape, "softcap"),
        ({"label_smoothing": 1.0}, UnsupportedShape, "label_smoothing"),
        ({"reduction": "man"}, UnknownName, "did you mean 'mean'"),
    ],
)
def test_bad_calls_name_the_argument(change, error, named, without_shape_checks):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(5, 3), "target": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=named):
        cross_entropy(**(arguments | change), backend="chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_whose_squares_overflow_cost_what_they_do_in_torch(backend, reduction):
    x, weight = torch.eye(2), torch.tensor([[3e19, -3e19], [0.0, 1.0], [-3e19, 3e19]])
    target, leaves = torch.tensor([0, 1]), (x.requires_grad_(), weight.requires_grad_())
    found = cross_entropy(x, weight, target, reduction=reduction, backend=backend)
    right = F.cross_entropy(F.linear(x, weight), target, reduction=reduction)
    torch.testing.assert_close(found, right)
    gradients = (torch.autograd.grad(loss.sum(), leaves) for loss in (found, right))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
