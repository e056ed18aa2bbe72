"""How a backend is chosen and loaded: what is not its kind of call, what it cannot serve, and what explain says."""

import json
import subprocess
import sys

import pytest
import torch

from omnimix.__main__ import main
from omnimix.errors import BackendUnavailable
from omnimix.kernels import delta_rule, explain, linear, native, strict, using
from omnimix.kernels.registry import Backend, Draw, Op

needs_compiler = pytest.mark.skipif(native.machine_refusal() is not None, reason=str(native.machine_refusal()))


def op(**step) -> Op:
    """Two backends: `native` for inputs of one element, and `chunked`; both are `torch.neg` here."""
    first = Backend(name="native", module="torch", function="neg", **step)
    other = Backend(name="chunked", module="torch", function="neg")
    return Op(name="neg", backends=(first, other), sequences=(), cases=tuple, summary="-x")


def one(arguments):
    return None if arguments["input"].numel() == 1 else "it takes one element"


def chosen(op, n, backend="auto"):
    return op.choose(backend, {"input": torch.ones(n)}, "cpu").name


def test_a_call_of_another_kind_is_passed_over_without_a_word(recwarn):
    entry = op(limits=one)
    for enabled in (True, False):
        with strict(enabled):
            assert (chosen(entry, 1), chosen(entry, 2)) == ("native", "chunked")
            with using("native"):
                assert (chosen(entry, 1), chosen(entry, 2)) == ("native", "chunked")
            with using("chunked"):
                assert chosen(entry, 1) == "chunked"
    assert not recwarn.list
    with pytest.raises(BackendUnavailable, match="'native' cannot serve this call: it takes one element"):
        chosen(entry, 2, "native")


def test_what_a_machine_cannot_serve_is_said_and_strict_mode_raises():
    entry = op(limits=one, refuse=lambda arguments: "there is no compiler")
    with pytest.warns(UserWarning, match="'chunked' serves this call on cpu, because native: there is no compiler"):
        assert chosen(entry, 1) == "chunked"
    with strict():
        assert chosen(entry, 2) == "chunked"
        with pytest.raises(BackendUnavailable, match="no compiler"):
            chosen(entry, 1)
    for context in (using("native"), strict(False)):
        with context, pytest.raises(BackendUnavailable, match="no compiler"):
            chosen(entry, 1, "native")
    with using("native"), pytest.raises(BackendUnavailable, match="no compiler"):
        chosen(entry, 1)


def step_arguments(**changes):
    draw = Draw.seeded(dtype=torch.float32)
    made = {name: draw.normal(1, 1, 2, 4) for name in ("q", "k", "v")}
    return made | {"initial_state": draw.normal(1, 2, 4, 4)} | changes


@needs_compiler
def test_explain_names_the_step_kernel(capsys):
    asked = ((1, []), (1, ["--grad"]), (2, []))
    for name, backends in (("gated_linear", ["native"] * 3), ("delta_rule", ["native", "chunked", "chunked"])):
        for (tokens, grad), backend in zip(asked, backends, strict=True):
            words = ["kernels", "explain", name, "--device", "cpu", "--tokens", str(tokens), *grad, "--json", "-"]
            assert main(words) == 0
            rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
            assert [name for name, row in rows.items() if row["auto"] == "chosen"] == [backend]
    assert rows["native"]["why"] == "it takes one step at a time, and there are several"


@needs_compiler
def test_explain_follows_using():
    with using("chunked"):
        rows = {row["backend"]: row["auto"] for row in explain("delta_rule", **step_arguments())}
    assert (rows["native"], rows["chunked"], rows["reference"]) == ("on request", "chosen", "on request")


META = torch.ones(1, 1, 2, 4, device="meta")


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": torch.ones(1, 2, 2, 4), "k": torch.ones(1, 2, 2, 4), "v": torch.ones(1, 2, 2, 4)}, "one step at a time"),
        ({"cu_seqlens": torch.tensor([0, 1])}, "no packed sequences"),
        ({"v": torch.ones(1, 1, 2, 4, requires_grad=True)}, "no gradients"),
        (dict.fromkeys("qkv", META) | {"initial_state": META.new_ones(1, 2, 4, 4)}, "on meta"),
        ({"q": torch.randn(1, 1, 2, 4, dtype=torch.complex64).conj().imag}, "lazy negation"),
    ],
)
def test_a_step_kernel_named_for_another_call_says_why_not(changes, reason):
    with pytest.raises(BackendUnavailable, match=reason):
        delta_rule(**step_arguments(**changes), backend="native")
    if reason != "on meta":
        delta_rule(**step_arguments(**changes))


@needs_compiler
def test_a_lazy_negation_is_read_right():
    x = torch.randn(1, 3, dtype=torch.complex64).conj().imag
    weight = torch.randn(2, 3)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight), x.resolve_neg() @ weight.t())


FRESH = """
import torch
from omnimix.kernels import norm, rotary

@torch.compile(fullgraph=True, backend="aot_eager")
def f(x, angle):
    return rotary(norm(x), angle)

x, angle = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 3)
assert torch.equal(f(x, angle), rotary(norm(x), angle))
"""


def test_backends_are_loaded_while_torch_compile_traces():
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
