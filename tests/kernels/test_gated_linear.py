"""What only `gated_linear` has to satisfy: the papers' quadratic forms, its own chunked algebra, its messages."""

from __future__ import annotations

import itertools
import math
from importlib import import_module

import pytest
import torch
from torch import Tensor

from omnimix.cli.check_kernels import results
from omnimix.errors import BackendUnavailable, UnknownName, UnsupportedShape
from omnimix.kernels import Draw, gated_linear, get_op, native

BACKENDS = [b for b in ("reference", "chunked", "native") if b != "native" or not native.machine_refusal()]
FAST = BACKENDS[1:]


def draw_qkv(
    time: int = 70, groups: int = 2, heads: int = 4, batch: int = 2, dk: int = 5, dv: int = 7
) -> dict[str, Tensor]:
    draw = Draw.seeded(time)
    q, k = draw.normal(batch, time, groups, dk), draw.normal(batch, time, groups, dk)
    return {"q": q, "k": k, "v": draw.normal(batch, time, heads, dv)}


def per_head(x: Tensor, heads: int) -> Tensor:
    """`(b, t, g, k)` -> `(b, h, t, k)`"""
    return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_attention_is_a_masked_product(backend):
    x = draw_qkv()
    q, k, v = per_head(x["q"], 4), per_head(x["k"], 4), x["v"].transpose(1, 2)
    expected = (q @ k.mT).tril() @ v / math.sqrt(5)
    output, state = gated_linear(**x, backend=backend)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    torch.testing.assert_close(state, k.mT @ v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_retention_weighs_by_powers_of_gamma(backend):
    """The parallel form of RetNet, arXiv 2307.08621, eq. 5: (Q Kᵀ ⊙ D) V with D_nm = γ^(n-m) for n >= m."""
    x = draw_qkv()
    gamma = 1 - 2.0 ** -torch.arange(1, 5, dtype=torch.float64)
    n = torch.arange(70)
    weights = (gamma[:, None, None] ** (n[:, None] - n)).tril()
    q, k, v = per_head(x["q"], 4), per_head(x["k"], 4), x["v"].transpose(1, 2)
    expected = (q @ k.mT * weights) @ v
    output, _ = gated_linear(**x, decay=gamma.log(), scale=1.0, backend=backend)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba2_is_a_semiseparable_matrix(backend):
    """Arxiv 2405.21060, section 3: y_j = Σ_i C_jᵀ A_j … A_{i+1} B_i x_i, with every product of the A written out."""
    x = draw_qkv(time=20, groups=1, heads=3, batch=1)
    a = Draw.seeded(9).uniform(0.2, 1.0, 1, 20, 3)
    expected = torch.zeros(1, 20, 3, 7, dtype=torch.float64)
    for j, head in itertools.product(range(20), range(3)):
        for i in range(j + 1):
            weight = (x["q"][0, j, 0] @ x["k"][0, i, 0]) * a[0, i + 1 : j + 1, head].prod()
            expected[0, j, head] += weight * x["v"][0, i, head]
    output, _ = gated_linear(**x, decay=a.log(), scale=1.0, backend=backend)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gla_divides_keys_by_cumulative_gates(backend):
    """The parallel form of GLA, arXiv 2312.06635: ((Q ⊙ B)(K / B)ᵀ ⊙ M) V, B the product of the α so far."""
    x = draw_qkv(time=30, groups=4)
    alpha = Draw.seeded(9).uniform(0.5, 1.0, 2, 30, 4, 5)
    b = alpha.cumprod(1).transpose(1, 2)
    q, k, v = per_head(x["q"], 4), per_head(x["k"], 4), x["v"].transpose(1, 2)
    expected = ((q * b) @ (k / b).mT).tril() @ v
    output, _ = gated_linear(**x, decay=alpha.log(), scale=1.0, backend=backend)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rwkv6_reads_before_it_writes(backend):
    """Arxiv 2404.05892, eq. 19, unrolled: wkv_t = diag(u) k_t v_t + Σ_{i<t} diag(Π_{i<j<t} w_j) k_i v_i."""
    x = draw_qkv(time=20, groups=2, heads=2, batch=1)
    draw = Draw.seeded(9)
    w, u = draw.uniform(0.2, 1.0, 1, 20, 2, 5), draw.normal(2, 5)
    expected = torch.zeros(1, 20, 2, 7, dtype=torch.float64)
    for t, head in itertools.product(range(20), range(2)):
        r, k, v = x["q"][0, t, head], x["k"][0, :, head], x["v"][0, :, head]
        wkv = torch.outer(u[head] * k[t], v[t])
        for i in range(t):
            wkv += torch.outer(w[0, i + 1 : t, head].prod(0) * k[i], v[i])
        expected[0, t, head] = r @ wkv
    output, _ = gated_linear(**x, decay=w.log(), bonus=u, scale=1.0, backend=backend)
    torch.testing.assert_close(output, expected)


# The chunked backend factorises weak decays, divides chunks for stronger ones, and sums channel by channel beyond.
STRENGTHS = {"weak": 0.05, "moderate": 1.0, "strong": 8.0, "resets": None}


def decay_of(case_decay: Tensor, strength: float | None) -> Tensor:
    if strength is None:
        return torch.where(Draw.seeded(5).uniform(0.0, 1.0, *case_decay.shape) < 0.1, -1e4, case_decay * 0.05)
    return case_decay * strength


def named_results(backend: str, arguments: dict) -> dict[str, Tensor]:
    return results(lambda **a: gated_linear(**a, backend=backend), arguments).named()


def assert_is_the_reference(backend: str, arguments: dict) -> None:
    expected, found = named_results("reference", arguments), named_results(backend, arguments)
    assert found.keys() == expected.keys()
    for name, true in expected.items():
        # The decays' gradient is a difference: its error is that of what is subtracted.
        torch.testing.assert_close(found[name], true, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(
    "case", [c for c in get_op("gated_linear").cases() if c.name != "no decay"], ids=lambda c: c.name
)
def test_every_strength_of_decay_is_served(case, strength, backend):
    for time in (15, 64, 150):
        draw = Draw.seeded(time)
        arguments = case.make(draw, 2, time) | {"initial_state": case.state(draw, 2)}
        arguments["decay"] = decay_of(arguments["decay"], STRENGTHS[strength])
        assert_is_the_reference(backend, arguments)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("lengths", [[1, 130, 3, 64], [5, 9, 2], [70, 70]], ids=str)
@pytest.mark.parametrize("name", ["scalar decay, grouped", "bonus"])
def test_packed_sequences_are_served(name, lengths, strength, backend):
    case = next(c for c in get_op("gated_linear").cases() if c.name == name)
    draw = Draw.seeded(3)
    arguments = case.make(draw, 1, sum(lengths)) | {"initial_state": case.state(draw, len(lengths))}
    arguments["decay"] = decay_of(arguments["decay"], STRENGTHS[strength])
    arguments["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    assert_is_the_reference(backend, arguments)


@pytest.mark.parametrize("size", [1, 40_000], ids=["many blocks", "few blocks"])
def test_the_division_into_blocks_changes_nothing(size, monkeypatch):
    # By its name: the attribute gated_linear of omnimix.kernels is the function.
    monkeypatch.setattr(import_module("omnimix.kernels.common.chunked_plan"), "BLOCK_BYTES", size)
    for name, lengths in itertools.product(("scalar decay", "decay per channel"), (None, [200, 3, 130, 64])):
        case = next(c for c in get_op("gated_linear").cases() if c.name == name)
        draw = Draw.seeded(3)
        time = 300 if lengths is None else sum(lengths)
        batch = 3 if lengths is None else 1
        arguments = case.make(draw, batch, time) | {"initial_state": case.state(draw, batch if lengths is None else 4)}
        arguments["decay"] = arguments["decay"] * 0.05
        if lengths is not None:
            arguments["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
        assert_is_the_reference("chunked", arguments)


# Keys and values of one vector, of tiles and vectors beside them, and of neither.
SIZES = [(1, 1), (16, 40), (24, 16), (33, 64), (64, 17)]


@pytest.mark.skipif(native.machine_refusal() is not None, reason=str(native.machine_refusal()))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_divides_heads_and_values_among_tasks(size, threads, monkeypatch):
    """One sequence of three blocks, the last with a tail of a chunk; heads share q and k or do not."""
    recurrence = import_module("omnimix.kernels.common.recurrence")
    monkeypatch.setattr(import_module("omnimix.kernels.gated_linear.native"), "BLOCK", 32)
    monkeypatch.setattr(recurrence, "SMALLEST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    divided = []
    for kind, groups, heads in itertools.product((None, "head", "scalar", "channel"), (1, 2), (2, 4)):
        x, draw = draw_qkv(time=83, groups=groups, heads=heads, batch=1, dk=size[0], dv=size[1]), Draw.seeded(2)
        shapes = {"head": (heads,), "scalar": (1, 83, heads), "channel": (1, 83, heads, size[0])}
        x |= {} if kind is None else {"decay": draw.log_decay(*shapes[kind])}
        x |= {} if groups == heads else {"initial_state": draw.normal(1, heads, *size)}
        divided.append(recurrence.division(x["q"], x["v"], 1))
        assert_is_the_reference("native", x)
    assert {parts[0] for parts in divided} == {threads}
    assert threads == 1 or {parts[1] > 1 for parts in divided} == {True, False}
    assert threads == 1 or any(parts[2] > 1 for parts in divided) == (size[1] > 8)


@pytest.mark.parametrize("backend", FAST)
def test_long_float32_stays_as_exact_as_the_reference(backend):
    """3,000 steps of weak decay, so that the state and the decays' running sums carry over many blocks."""
    for shape in ((1, 3000, 2), (1, 3000, 2, 8)):
        draw = Draw.seeded(1)
        arguments = {"q": draw.normal(1, 3000, 2, 8), "k": draw.normal(1, 3000, 2, 8), "v": draw.normal(1, 3000, 2, 8)}
        arguments["decay"] = draw.log_decay(*shape, scale=0.005)
        true = named_results(backend, arguments)
        single = {name: x.float() for name, x in arguments.items()}
        for name, x in named_results(backend, single).items():
            error = (x.double() - true[name]).abs().max() / true[name].abs().max()
            assert error < 2e-5, (name, error)


@pytest.mark.parametrize("backend", FAST)
def test_training_keeps_few_states(backend):
    """A state for each block of chunks, not for each step: linear in time, and less than the values themselves."""
    x = {name: t.float().requires_grad_() for name, t in draw_qkv(time=2048, groups=4, dk=32, dv=64).items()}
    output, _ = gated_linear(**x, backend=backend)
    saved = sum(t.nbytes for t in output.grad_fn.saved_tensors if t is not None)
    given = sum(t.nbytes for t in x.values()) + output.nbytes
    assert saved < 1.5 * given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 70, 1, 5)}, "q .* and k .* must be equal"),
        ({"q": (2, 69, 2, 5), "k": (2, 69, 2, 5)}, r"start with v's \(2, 70\)"),
        ({"q": (2, 70, 3, 5), "k": (2, 70, 3, 5)}, "its 3 heads must divide v's 4 heads"),
        ({"decay": (2, 70, 2)}, r"decay: shape \(2, 70, 2\) is none of"),
        ({"bonus": (2, 5)}, r"bonus: shape \(2, 5\) is not \(4, 5\)"),
        ({"initial_state": (1, 4, 5, 7)}, r"initial_state: shape \(1, 4, 5, 7\) is not \(2, 4, 5, 7\)"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_shapes_are_named(change, message):
    arguments = draw_qkv() | {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(UnsupportedShape, match=message):
        gated_linear(**arguments)


def test_packed_sequences_need_batch_one():
    with pytest.raises(UnsupportedShape, match="cu_seqlens: packed sequences need batch 1, not 2"):
        gated_linear(**draw_qkv(), cu_seqlens=torch.tensor([0, 70]))


def test_backends_are_named():
    with pytest.raises(UnknownName, match="chunked"):
        gated_linear(**draw_qkv(), backend="chunkd")


@pytest.mark.triton
def test_triton_says_why_it_cannot_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="gated_linear.*triton.*cpu"):
        gated_linear(**draw_qkv(), backend="triton")
