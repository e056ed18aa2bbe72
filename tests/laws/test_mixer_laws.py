"""The ten laws, for every registered mixer and for hybrids. A new mixer inherits them by registering."""

from __future__ import annotations

import io
from functools import partial

import pytest
import safetensors.torch
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from omnimix import kernels
from omnimix.backbones import Layout, list_mixers
from omnimix.backbones.scan import SCANS
from omnimix.cli.check_kernels import error, low_precision_excess, results

from .checker import assert_equal, told
from .ran import runs_on_triton
from .subjects import (
    BOTH,
    CAUSAL,
    Alone,
    Subject,
    arguments,
    both_way_subjects,
    call,
    capability,
    causal_subjects,
    floating,
    leaves,
    subjects,
    tokens,
    with_leaves,
)

LENGTHS = (1, 5, 3)
BORDERS = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
# One sequence without tokens in the middle, one at the end.
WITH_EMPTY = torch.tensor([0, 1, 1, 6, 9, 9], dtype=torch.int32)
DIRECTIONS = [name for name in SCANS if name != "forward"]


def first_example(name: str, scan: str) -> Alone:
    return next(s for s in subjects(scan) if s.name == f"{name}-0").module()


def on_backend(name: str, function):
    def run(**named):
        with kernels.using(name):
            return function(**named)

    return run


@causal_subjects
def test_law_1_the_fast_path_is_the_reference(subject: Subject):
    module = subject.module()
    function = call(module, CAUSAL)
    for time in (9, 70):
        given = arguments(module, tokens(2, time))
        with told(f"{time} tokens"):
            assert_equal(results(function, given), results(on_backend("reference", function), given))


@causal_subjects
def test_law_2_pieces_are_the_whole(subject: Subject):
    module = subject.module()
    assert capability(module, "streaming")

    def in_pieces(lengths, *, x, **parameters):
        outputs, state = [], None
        for piece in x.split(lengths, dim=1):
            y, state = functional_call(module, parameters, (piece, CAUSAL, state))
            outputs.append(y)
        return (torch.cat(outputs, dim=1), *floating(state))

    given = arguments(module, tokens(2, 9))
    whole = results(call(module, CAUSAL), given)
    for lengths in ([4, 5], [8, 1], [2, 1, 6], [1] * 9):
        with told(f"pieces {lengths}"):
            assert_equal(results(partial(in_pieces, lengths), given), whole)


@causal_subjects
def test_law_2_in_inference_mode(subject: Subject):
    """Where fast paths serve that gradients would keep from serving: prefill, then single tokens, and none."""
    module = subject.module()
    x = tokens(2, 9)
    with torch.inference_mode():
        whole, final = module(x, CAUSAL)
        outputs, state = [], None
        for piece in x.split([5, 0, 1, 1, 2], dim=1):
            y, state = module(piece, CAUSAL, state)
            outputs.append(y)
        assert error(torch.cat(outputs, dim=1), whole) < 1e-9
        assert all(error(a, b) < 1e-9 for a, b in zip(floating(state), floating(final), strict=True))
        # In float32 too, whose kernels are others.
        single = subject.module(torch.float32)
        narrow = x.float()
        with kernels.using("reference"):
            wanted, _ = single(narrow, CAUSAL)
        _, state = single(narrow[:, :8], CAUSAL)
        y, _ = single(narrow[:, 8:], CAUSAL, state)
        assert error(y, wanted[:, 8:]) < 1e-3


@causal_subjects
def test_law_2_no_tokens_leave_the_state_as_it_is(subject: Subject):
    module = subject.module()
    _, state = module(tokens(2, 5), CAUSAL)
    y, after = module(tokens(2, 0), CAUSAL, state)
    assert y.shape == (2, 0, tokens(1, 1).shape[-1])
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(after), strict=True))
    _, fresh = module(tokens(2, 0), CAUSAL)
    initial = module.init_state(2, device=torch.device("cpu"), dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(leaves(fresh), leaves(initial), strict=True))


@causal_subjects
def test_law_2_the_initial_state_is_no_state(subject: Subject):
    module = subject.module()
    x = tokens(2, 5)
    y, _ = module(x, CAUSAL, module.init_state(2, device=torch.device("cpu"), dtype=x.dtype))
    assert error(y, module(x, CAUSAL)[0]) < 1e-9


@causal_subjects
def test_law_3_packed_is_each_alone(subject: Subject):
    module = subject.module()
    packed = Layout(causal=True, cu_seqlens=BORDERS)
    assert capability(module, "packed")

    def each_alone(*, x, **parameters):
        outputs = []
        for first, second in zip(x[:, :9].split(list(LENGTHS), 1), x[:, 9:].split(list(LENGTHS), 1), strict=True):
            y, state = functional_call(module, parameters, (first, CAUSAL))
            z, _ = functional_call(module, parameters, (second, CAUSAL, state))
            outputs.append((y, z))
        return tuple(torch.cat(part, dim=1) for part in zip(*outputs, strict=True))

    def together(*, x, **parameters):
        y, state = functional_call(module, parameters, (x[:, :9], packed))
        z, _ = functional_call(module, parameters, (x[:, 9:], packed, state))
        return y, z

    given = arguments(module, tokens(1, 18))
    assert_equal(results(together, given), results(each_alone, given))


@causal_subjects
def test_law_3_in_inference_mode_and_with_empty_sequences(subject: Subject):
    module = subject.module()
    x, rest = tokens(1, 9), tokens(1, 5, seed=1)
    with torch.inference_mode():
        y, state = module(x, Layout(cu_seqlens=WITH_EMPTY))
        z, _ = module(rest, Layout(cu_seqlens=torch.arange(6, dtype=torch.int32)), state)
        lengths = WITH_EMPTY.diff().tolist()
        for i, (row, own) in enumerate(zip(x.split(lengths, 1), y.split(lengths, 1), strict=True)):
            alone, before = module(row, CAUSAL)
            assert error(own, alone) < 1e-9
            assert error(z[:, i : i + 1], module(rest[:, i : i + 1], CAUSAL, before)[0]) < 1e-9


@causal_subjects
def test_law_3_a_packed_state_goes_on_as_a_batch(subject: Subject):
    module = subject.module()
    _, state = module(tokens(1, 9), Layout(causal=True, cu_seqlens=BORDERS))
    next_tokens = tokens(3, 2, seed=1)
    y, _ = module(next_tokens, CAUSAL, state)
    for i, x in enumerate(tokens(1, 9).split(list(LENGTHS), dim=1)):
        _, alone = module(x, CAUSAL)
        z, _ = module(next_tokens[i : i + 1], CAUSAL, alone)
        assert error(y[i : i + 1], z) < 1e-9


@causal_subjects
def test_law_3_no_gradient_crosses_a_border(subject: Subject):
    module = subject.module()
    x = tokens(1, 9).requires_grad_()
    y, state = module(x, Layout(causal=True, cu_seqlens=BORDERS))
    second = y[:, 1:6].sum() + sum(t[1].sum() for t in floating(state))
    (g,) = torch.autograd.grad(second, x)
    assert g[:, 1:6].abs().min() > 0
    assert g[:, :1].abs().max() == 0 and g[:, 6:].abs().max() == 0


@both_way_subjects
def test_law_3_packed_is_each_alone_both_ways(subject: Subject):
    module = subject.module()

    def each_alone(*, x, **parameters):
        rows = [
            functional_call(module, parameters, (row, Layout(causal=False)))[0] for row in x.split(list(LENGTHS), 1)
        ]
        return (torch.cat(rows, dim=1),)

    given = arguments(module, tokens(1, 9))
    packed = call(module, Layout(causal=False, cu_seqlens=BORDERS))
    assert_equal(results(packed, given), results(each_alone, given))


@causal_subjects
def test_law_4_no_token_sees_the_future(subject: Subject):
    module = subject.module()
    x = tokens(2, 8).requires_grad_()
    y, _ = module(x, CAUSAL)
    (g,) = torch.autograd.grad(y[:, :4].square().sum(), x)
    assert g[:, 4:].abs().max() == 0
    assert (g[:, :4].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", list_mixers())
def test_law_4_both_ways_every_token_sees_every_other(name: str):
    for scan in DIRECTIONS:
        with told(f"scan {scan!r}"):
            every_token_sees_every_other(first_example(name, scan))


def every_token_sees_every_other(module: Alone) -> None:
    assert capability(module, "bidirectional")
    # A row for each output; rows are independent by law 5.
    x = tokens(1, 10).repeat(10, 1, 1).requires_grad_()
    place = torch.arange(10)
    y, state = module(x, BOTH)
    assert state is None
    (reached,) = torch.autograd.grad(y[place, place].sum(), x)
    seen = reached.abs().amax(-1) > 0
    if field := capability(module, "receptive_field"):
        near = (place[:, None] - place).abs() < field
        assert torch.equal(seen, near | (place < getattr(module.inner, "sinks", 0)))
    else:
        assert seen.all()


@causal_subjects
def test_law_5_rows_are_independent_and_runs_repeat(subject: Subject):
    module = subject.module()
    given = arguments(module, tokens(3, 9))

    def row_by_row(*, x, **parameters):
        rows = [call(module, CAUSAL)(x=row, **parameters) for row in x.split(1)]
        return tuple(torch.cat(part) for part in zip(*rows, strict=True))

    once = results(call(module, CAUSAL), given)
    assert_equal(once, results(row_by_row, given))
    again = results(call(module, CAUSAL), given).named()
    assert all(torch.equal(x, again[name]) for name, x in once.named().items())


@causal_subjects
def test_law_5_in_inference_mode(subject: Subject):
    module = subject.module()
    x, new = tokens(3, 9), tokens(3, 1, seed=1)
    with torch.inference_mode():
        y, state = module(x, CAUSAL)
        once, again = module(new, CAUSAL, state)[0], module(new, CAUSAL, state)[0]
        assert torch.equal(once, again) and torch.equal(module(x, CAUSAL)[0], y)
        for i in range(3):
            assert error(module(x[i : i + 1], CAUSAL)[0], y[i : i + 1]) < 1e-9
            row = state.select(torch.tensor([i]))
            assert error(module(new[i : i + 1], CAUSAL, row)[0], once[i : i + 1]) < 1e-9


@causal_subjects
def test_law_6_a_gradient_reaches_every_parameter_and_the_state(subject: Subject):
    module = subject.module()
    _, state = module(tokens(2, 5), CAUSAL)
    given = [t.detach().requires_grad_() for t in floating(state)]
    y, _ = module(tokens(2, 5, seed=1), CAUSAL, with_leaves(state, given))
    y.square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"no gradient reaches {name}"
    for t in given:
        if not t.numel():  # mamba2's convolution of one tap remembers nothing
            continue
        assert t.grad is not None and t.grad.abs().max() > 0, f"no gradient reaches a state of shape {tuple(t.shape)}"


@causal_subjects
def test_law_6_checkpointing_changes_no_gradient(subject: Subject):
    module = subject.module()
    given = arguments(module, tokens(2, 5))

    def again_in_the_backward_pass(**named):
        return checkpoint(call(module, CAUSAL), use_reentrant=False, **named)

    assert_equal(results(again_in_the_backward_pass, given), results(call(module, CAUSAL), given))


@pytest.mark.parametrize("name", list_mixers())
def test_law_6_a_gradient_reaches_every_direction(name: str):
    for scan in DIRECTIONS:
        module = first_example(name, scan)
        module(tokens(2, 10), BOTH)[0].square().sum().backward()
        for parameter, p in module.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, f"scan {scan!r}: no gradient reaches {parameter}"


@causal_subjects
def test_law_7_low_precision_costs_no_more_than_it_must(subject: Subject):
    exact, rounded = subject.module(), subject.module(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            p.copy_(q)
    x = tokens(2, 70, torch.bfloat16)
    truth = results(call(exact, CAUSAL, keep=False), arguments(exact, x.double()))
    function = call(rounded, CAUSAL, keep=False)
    found = results(function, arguments(rounded, x)).named()
    plain = results(on_backend("reference", function), arguments(rounded, x)).named()
    for name, wanted in truth.named().items():
        excess = low_precision_excess(found[name], plain[name], wanted)
        assert excess <= 1, f"{name}: in bfloat16 the error is {excess:.2f} times what is allowed"


@causal_subjects
def test_law_7_autocast_stays_near_full_precision(subject: Subject):
    module = subject.module(torch.float32)

    def run(enabled: bool, backward: bool = False) -> dict[str, torch.Tensor]:
        x = tokens(2, 70, torch.float32).requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = module.init_state(2, device=torch.device("cpu"), dtype=x.dtype)
            y, state = module(x[:, :40], CAUSAL, state)
            z, _ = module(x[:, 40:], CAUSAL, state)
        y = torch.cat([y, z], dim=1).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            y.square().mean().backward()
        return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}

    found, wanted, inside = run(True), run(False), run(True, backward=True)
    with kernels.using("reference"):
        plain = run(True)
    # Many call `backward` inside autocast too, where torch rounds the factors of its own products.
    for name, gradient in found.items():
        assert (inside[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    # Of tokens the median: rounding makes some queries of moba and nsa choose other blocks.
    distance = (found["y"] - wanted["y"]).norm(dim=-1) / wanted["y"].norm(dim=-1)
    assert distance.median() < 0.05
    for name, gradient in wanted.items():
        assert found[name].isfinite().all()
        # What rounding in the projections alone costs, however sensitive the mixer is to it.
        least = (plain[name] - gradient).norm()
        assert (found[name] - gradient).norm() <= 2 * least + 0.05 * gradient.norm(), name


@pytest.mark.slow
@causal_subjects
def test_law_7_long_and_large_inputs_stay_finite(subject: Subject):
    module = subject.module(torch.bfloat16)
    x = (tokens(1, 16384, torch.bfloat16) * 100).requires_grad_()
    y, state = module(x, CAUSAL)
    y.sum().backward()
    for t in [y, x.grad, *leaves(state), *(p.grad for p in module.parameters())]:
        assert t.isfinite().all()


@causal_subjects
def test_law_8_builds_without_memory_and_saves_whole(subject: Subject):
    module = subject.module()
    with torch.device("meta"):
        shell = Alone(subject.build())
    assert all(p.is_meta for p in shell.parameters())
    saved = safetensors.torch.save(module.state_dict())
    shell.to(torch.float64).to_empty(device="cpu").load_state_dict(safetensors.torch.load(saved))
    x = tokens(2, 5)
    assert torch.equal(shell(x, CAUSAL)[0], module(x, CAUSAL)[0])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == module.state_dict().keys()


@causal_subjects
def test_law_9_the_state_stays_as_small_as_declared(subject: Subject):
    module = subject.module()
    sizes = [sum(t.nbytes for t in leaves(module(tokens(1, t), CAUSAL)[1])) for t in (1, 7, 30)]
    if capability(module, "constant_state"):
        assert len(set(sizes)) == 1
    else:
        assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.triton
@pytest.mark.slow
@causal_subjects
def test_law_10_triton_is_the_reference(subject: Subject):
    module = subject.module()
    function, given = call(module, CAUSAL), arguments(module, tokens(1, 19))
    assert_equal(results(on_backend("triton", function), given), results(on_backend("reference", function), given))
    decoded, first, last = [], tokens(1, 3), tokens(1, 1, seed=1)

    def decode() -> None:
        with torch.inference_mode(), kernels.using("triton"):
            decoded.append(torch.cat([(out := module(first, CAUSAL))[0], module(last, CAUSAL, out[1])[0]], dim=1))

    runs_on_triton(decode)
    assert error(decoded[0], module(torch.cat([first, last], dim=1), CAUSAL)[0]) < 1e-9
