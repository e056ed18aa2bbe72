"""How a backend is chosen and loaded: what is not its kind of call, what it cannot serve, and what explain says."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch

from omnimix.__main__ import main
from omnimix.errors import BackendUnavailable
from omnimix.kernels import delta_rule, explain, get_op, mamba2_step, native, norm, strict, using
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


def mamba2_arguments():
    return get_op("mamba2_step").cases()[0].make(Draw.seeded(dtype=torch.float32), 1, 1)


@needs_compiler
def test_explain_names_the_kernels_of_tokens_and_of_training(capsys):
    for name, (tokens, grad) in product(("gated_linear", "delta_rule"), ((1, []), (1, ["--grad"]), (2, []))):
        words = ["kernels", "explain", name, "--device", "cpu", "--tokens", str(tokens), *grad, "--json", "-"]
        assert main(words) == 0
        rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
        assert [name for name, row in rows.items() if row["auto"] == "chosen"] == ["native"]


@needs_compiler
def test_explain_names_a_kernel_without_gradients_and_what_trains_in_its_place(capsys):
    for grad, backend in (([], "native"), (["--grad"], "chunked")):
        assert (
            main(["kernels", "explain", "mamba2_step", "--device", "cpu", "--tokens", "1", *grad, "--json", "-"]) == 0
        )
        rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
        assert [name for name, row in rows.items() if row["auto"] == "chosen"] == [backend]
    assert rows["native"]["why"] == "it computes no gradients, and a tensor requires one"


@needs_compiler
def test_explain_follows_using():
    with using("chunked"):
        rows = {row["backend"]: row["auto"] for row in explain("delta_rule", **step_arguments())}
    assert (rows["native"], rows["chunked"], rows["reference"]) == ("on request", "chosen", "on request")


@needs_compiler
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.requires_grad_(), "no gradients"),
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: torch.complex(x, -x).conj().imag, "lazy negation"),
        (lambda x: x.half(), "float32 and float64"),
    ],
)
def test_a_kernel_named_for_another_kind_of_call_says_why_not(change, reason):
    arguments = {name: change(x) for name, x in mamba2_arguments().items()}
    with pytest.raises(BackendUnavailable, match=reason):
        mamba2_step(**arguments, backend="native")
    mamba2_step(**arguments)


@needs_compiler
def test_large_states_are_served_by_matrix_products_but_for_a_single_step():
    for tokens, size, backend in ((3, 256, "native"), (3, 257, "chunked"), (1, 257, "native")):
        x = torch.zeros(1, tokens, 1, size)
        rows = {row["backend"]: row for row in explain("delta_rule", q=x, k=x, v=x)}
        assert rows[backend]["auto"] == "chosen"
    x = torch.zeros(1, 3, 1, 257)
    with pytest.raises(BackendUnavailable, match="at most 65536 elements a head"):
        delta_rule(x, x, x, backend="native")


@needs_compiler
def test_a_lazy_negation_is_read_right():
    arguments = mamba2_arguments()
    D = arguments.pop("D")
    lazy = torch.complex(D, -D).conj().imag
    assert lazy.is_neg()
    with torch.inference_mode():
        for found, wanted in zip(mamba2_step(D=lazy, **arguments), mamba2_step(D=D, **arguments), strict=True):
            torch.testing.assert_close(found, wanted)


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


def test_a_compiled_call_follows_using(without_shape_checks):
    from torch._dynamo.testing import CompileCounter

    counter, x = CompileCounter(), torch.randn(4, 8)
    compiled = torch.compile(norm, fullgraph=True, backend=counter)
    with using("reference"):
        compiled(x)
    for frames, context in ((2, using("auto")), (2, using("reference")), (3, using("chunked"))):
        with context:
            compiled(x)
        assert counter.frame_count == frames
