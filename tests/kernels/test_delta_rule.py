"""What only `delta_rule` has to satisfy: what the papers say it does, its own chunked algebra, its messages."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest
import torch
from torch import Tensor

from omnimix.cli.check_kernels import FLOAT32_TOLERANCE, error, results
from omnimix.errors import BackendUnavailable, UnsupportedCall, UnsupportedShape
from omnimix.kernels import Draw, delta_rule, gated_linear, native

BACKENDS = [b for b in ("reference", "chunked", "native") if b != "native" or not native.machine_refusal()]
FAST = BACKENDS[1:]


def draw_inputs(
    time: int = 70, groups: int = 2, heads: int = 4, dk: int = 6, dv: int = 7, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    draw = Draw.seeded(time, dtype=dtype)
    return {
        "q": draw.normal(2, time, groups, dk),
        "k": torch.nn.functional.normalize(draw.normal(2, time, groups, dk), dim=-1),
        "v": draw.normal(2, time, heads, dv),
        "beta": draw.uniform(0.0, 2.0, 2, time, heads),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_is_read_and_replaced(backend):
    """With β = 1 a unit key holds the value written to it last; orthogonal keys do not disturb each other."""
    keys = torch.eye(6, dtype=torch.float64)[torch.arange(70) % 6].view(1, 70, 1, 6)
    v = Draw.seeded().normal(1, 70, 1, 7)
    # Asks for the key of five steps hence, which is that of one step ago.
    output, state = delta_rule(keys.roll(-5, dims=1), keys, v, scale=1.0, backend=backend)
    torch.testing.assert_close(output[:, 1:65], v[:, :64])
    torch.testing.assert_close(state[0, 0, 69 % 6], v[0, 69, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transitions_are_products_of_householder_matrices(backend):
    """DeltaNet, arXiv 2406.06484: S_T = Σ_i Π_{j>i} (I - β_j k_j k_jᵀ) β_i k_i v_iᵀ, written out."""
    x = draw_inputs(time=37, groups=1, heads=1)
    k, v, beta = x["k"][0, :, 0], x["v"][0, :, 0], x["beta"][0, :, 0]
    expected = torch.zeros(6, 7, dtype=torch.float64)
    for i in range(37):
        write = beta[i] * k[i, :, None] * v[i]
        for j in range(i + 1, 37):
            write = (torch.eye(6, dtype=torch.float64) - beta[j] * k[j, :, None] * k[j]) @ write
        expected += write
    _, state = delta_rule(**x, backend=backend)
    torch.testing.assert_close(state[0, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_removal_it_is_gated_linear(backend):
    x = draw_inputs()
    decay = Draw.seeded(1).log_decay(2, 70, 4, 6)
    found = delta_rule(**x, decay=decay, removal=torch.zeros_like(x["k"]), backend=backend)
    expected = gated_linear(x["q"], x["k"], x["v"] * x["beta"][..., None], decay, backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_general_form_contains_the_delta_form(backend):
    """b reads the undecayed state, so that the removal key takes the decay with it."""
    x = draw_inputs(groups=4)
    decay = Draw.seeded(1).log_decay(2, 70, 4, 6)
    expected = delta_rule(**x, decay=decay, backend=backend)
    beta = x.pop("beta")[..., None]
    found = delta_rule(
        x["q"], beta * x["k"], x["v"], decay=decay, a=-beta * x["k"], b=x["k"] * decay.exp(), backend=backend
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("time", [63, 64, 512])
def test_repeated_keys_and_full_steps_keep_float32(time, backend):
    """I - 2 k kᵀ over and over: the powers of the chunk's triangular matrix would reach 1e18 on the way."""
    x = {name: t[:, :1].expand(-1, time, -1, -1) for name, t in draw_inputs(1).items() if name != "beta"}
    x["v"], beta = Draw.seeded().normal(2, time, 4, 7), torch.full((2, time, 4), 2.0, dtype=torch.float64)
    expected, _ = delta_rule(**x, beta=beta, backend="reference")
    narrow = {name: t.float() for name, t in x.items()}
    found, _ = delta_rule(**narrow, beta=beta.float(), backend=backend)
    assert error(found, expected) < 1e-4


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("form", ["delta", "general"])
@pytest.mark.parametrize("shape", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [0.1, 2.0, 20.0])
def test_decays_of_every_strength_keep_float32(form: str, shape: str, strength: float, fast: str):
    """In plain torch from whole chunks through shorter ones to scores made step by step."""
    x = draw_inputs(96, groups=4, dtype=torch.float32)
    draw = Draw.seeded(1, dtype=torch.float32)
    x["decay"] = draw.log_decay(*((2, 96, 4) if shape == "scalar" else (2, 96, 4, 6)), scale=strength)
    if form == "general":
        beta = x.pop("beta")[..., None]
        x |= {"a": -beta * x["k"], "b": x["k"] * draw.uniform(0.0, 1.0, 2, 96, 4, 6)}

    def call(backend: str):
        return lambda **arguments: delta_rule(**arguments, backend=backend)

    found = results(call(fast), x).named()
    truth = results(call("reference"), {name: t.double() for name, t in x.items()}).named()
    assert {name: e for name, t in truth.items() if (e := error(found[name], t)) > FLOAT32_TOLERANCE} == {}


@pytest.mark.parametrize("size", [1, 15, 16, 32, 63, 64])
def test_triangular_inverse(size: int):
    block = import_module("omnimix.kernels.delta_rule.chunked_block")
    lower = Draw.seeded().normal(3, size, size, scale=0.3).tril(-1)
    eye = torch.eye(size, dtype=lower.dtype).expand_as(lower)
    torch.testing.assert_close(block.unit_lower_inverse(lower) @ (eye - lower), eye)


# Keys and values of one number, of vectors and tails of them, and of several columns of vectors.
SIZES = [(1, 1), (16, 40), (24, 16), (33, 100)]
EDGES = [0, 1, 34, 34, 41]


@pytest.mark.skipif(native.machine_refusal() is not None, reason=str(native.machine_refusal()))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", ["plain", "beta", "removal", "general"])
def test_native_divides_heads_and_values_among_tasks(form, size, threads, monkeypatch):
    """Whole sequences and packed ones of one block to three, with tails; heads share keys or do not."""
    recurrence = import_module("omnimix.kernels.common.recurrence")
    monkeypatch.setattr(import_module("omnimix.kernels.delta_rule.native"), "BLOCK", 16)
    monkeypatch.setattr(recurrence, "SMALLEST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for kind, (groups, heads), lengths in product((None, "head", "scalar", "channel"), ((1, 2), (2, 2)), (None, EDGES)):
        draw = Draw.seeded(heads)
        shape, of_values = (1, 41, groups, size[0]), (1, 41, heads)
        key = torch.nn.functional.normalize(draw.normal(*shape), dim=-1)
        x = {"q": draw.normal(*shape), "k": key * draw.uniform(0.5, 1.0, *shape), "v": draw.normal(*of_values, size[1])}
        if form in ("beta", "removal"):
            x["beta"] = draw.uniform(0.0, 2.0, *of_values)
        if form == "removal":
            x["removal"] = key
        if form == "general":
            x |= {"a": -key * draw.uniform(0.0, 1.0, *shape), "b": key}
        if kind is not None:
            shapes = {"head": (heads,), "scalar": of_values, "channel": (*of_values, size[0])}
            x["decay"] = draw.log_decay(*shapes[kind])
        if groups < heads:
            x["initial_state"] = draw.normal(1 if lengths is None else len(lengths) - 1, heads, *size)
        if lengths is not None:
            x["cu_seqlens"] = torch.tensor(lengths)
        found, truth = (
            results(lambda backend=backend, **arguments: delta_rule(**arguments, backend=backend), x).named()
            for backend in ("native", "reference")
        )
        assert found.keys() == truth.keys()
        for name, t in truth.items():
            torch.testing.assert_close(found[name], t, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("kept", [0, 1])
def test_either_output_alone_has_gradients(kept: int, fast: str):
    x = draw_inputs(40) | {"decay": Draw.seeded(1).log_decay(2, 40, 4), "initial_state": torch.ones(2, 4, 6, 7)}
    x["initial_state"] = x["initial_state"].double()
    found, truth = (
        results(lambda backend=backend, **arguments: delta_rule(**arguments, backend=backend)[kept], x).named()
        for backend in (fast, "reference")
    )
    for name, t in truth.items():
        torch.testing.assert_close(found[name], t, msg=name)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 70, 2, 5)}, "must be equal"),
        ({"v": torch.zeros(2, 70, 3, 7)}, "its 2 heads must divide v's 3"),
        ({"beta": torch.zeros(2, 70, 2)}, "beta: shape"),
        ({"decay": torch.zeros(2, 70, 2)}, "decay: shape"),
        ({"removal": torch.zeros(2, 70, 4, 6)}, "removal: shape"),
        ({"initial_state": torch.zeros(2, 4, 7, 6)}, "initial_state: shape"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "batch 1, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict, message: str):
    with pytest.raises(UnsupportedShape, match=message):
        delta_rule(**draw_inputs() | change)


def test_forms_do_not_mix():
    x = draw_inputs()
    key = x["k"]
    with pytest.raises(UnsupportedCall, match="a is given without b"):
        delta_rule(**x, a=key)
    with pytest.raises(UnsupportedCall, match="b is given without a"):
        delta_rule(**x, b=key)
    with pytest.raises(UnsupportedCall, match="beta cannot be combined with a and b"):
        delta_rule(**x, a=key, b=key)
    del x["beta"]
    with pytest.raises(UnsupportedCall, match="removal cannot be combined with a and b"):
        delta_rule(**x, a=key, b=key, removal=key)


def test_triton_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="delta_rule: backend 'triton' cannot serve"):
        delta_rule(**draw_inputs(), backend="triton")
