"""The laws, for whole backbones: what each system's parts declare together is what it is held to."""

from __future__ import annotations

import json
from functools import partial

import pytest
import safetensors.torch
import torch
from torch.func import functional_call

from omnimix import kernels
from omnimix.backbones import Backbone, BackboneConfig, Context, Layout, State, from_dict, to_dict
from omnimix.backbones.layout import offsets
from omnimix.cli.check_kernels import error, results

from .checker import assert_equal, told
from .systems import System, systems

SYSTEMS = systems()
LENGTHS = (1, 0, 5, 3)


with torch.device("meta"):
    CAPABILITIES = {name: Backbone(system.config).capabilities for name, system in SYSTEMS.items()}


def subjects(keep):
    """The systems for which `keep(capabilities, system)` holds."""
    kept = [name for name, can in CAPABILITIES.items() if keep(can, SYSTEMS[name])]
    return pytest.mark.parametrize("name", kept)


every = subjects(lambda can, system: True)
causal = subjects(lambda can, system: can.causal and not system.train and system.layout is None)
sequential = subjects(lambda can, system: can.causal and can.streaming and not system.train and system.layout is None)


def floating(state: State | None) -> list[torch.Tensor]:
    return [] if state is None else [t for t in state.tensors() if t.is_floating_point()]


def arguments(net: Backbone, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x} | dict(net.named_parameters())


def call(system: System, net: Backbone, layout: Layout | None = None):
    """`net` as a function of `arguments`, giving outputs, losses and state."""

    def function(*, x, **parameters):
        out = functional_call(net, parameters, (x, system.context(x, layout)))
        return (out.y, *out.losses.values(), *floating(out.state))

    return function


def on_backend(name: str, function):
    def run(**named):
        with kernels.using(name):
            return function(**named)

    return run


@every
def test_law_1_the_fast_path_is_the_reference(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    function, given = call(system, net), arguments(net, system.tokens(2))
    assert_equal(results(function, given), results(on_backend("reference", function), given))


@pytest.mark.slow
@sequential
def test_law_2_pieces_are_the_whole(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()

    def in_pieces(lengths, *, x, **parameters):
        outputs, state = [], net.init_state(2, dtype=x.dtype)
        for piece in x.split(lengths, dim=1):
            out = functional_call(net, parameters, (piece, system.context(piece), state))
            outputs.append(out.y)
            state = out.state
        return (torch.cat(outputs, dim=1), *floating(state))

    given = arguments(net, system.tokens(2))
    # What primes a sequence has been read before `init_state` returns, so that its gradient takes another path.
    primes = any(t.primes for t in net.transitions.values())
    whole = results(call(system, net), given, backward=not primes)
    for lengths in ([5, 0, 4], [1] * 9):
        with told(f"pieces {lengths}"):
            found = results(partial(in_pieces, lengths), given, backward=not primes)
            if len(whole.outputs) == len(found.outputs):
                assert_equal(found, whole)
            else:
                assert error(found.outputs[0], whole.outputs[0]) < 1e-9
            with torch.inference_mode():
                assert error(in_pieces(lengths, **given)[0], call(system, net)(**given)[0]) < 1e-9


@pytest.mark.slow
@subjects(lambda can, system: can.packed and can.causal and not system.train and system.layout is None)
def test_law_3_packed_is_each_alone(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    packed = Layout(cu_seqlens=offsets(torch.tensor(LENGTHS)))
    n, t, resumes = len(LENGTHS), sum(LENGTHS), CAPABILITIES[name].streaming

    def each_alone(*, x, **parameters):
        outputs = []
        firsts, seconds = (half.split(list(LENGTHS), 1) for half in x.split(t, 1))
        for i, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            rows = slice(i, i + 1)
            out = functional_call(net, parameters, (first, system.context(first, rows=rows)))
            state = out.state if resumes else None
            rest = functional_call(net, parameters, (second, system.context(second, rows=rows), state))
            outputs.append((out.y, rest.y))
        return tuple(torch.cat(part, dim=1) for part in zip(*outputs, strict=True))

    def together(*, x, **parameters):
        first, second = x.split(t, 1)
        out = functional_call(net, parameters, (first, system.context(first, packed, slice(0, n))))
        state = out.state if resumes else None
        rest = functional_call(net, parameters, (second, system.context(second, packed, slice(0, n)), state))
        return out.y, rest.y

    given = arguments(net, system.tokens(1, 2 * t))
    assert_equal(results(together, given), results(each_alone, given))


@pytest.mark.slow
@subjects(lambda can, system: can.packed and len(system.grids) > 1)
def test_law_3_packed_images_are_each_alone(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    lengths = [t * h * w for t, h, w in system.grids]
    layout = Layout(causal=False, grid=system.grids, cu_seqlens=offsets(torch.tensor(lengths)))
    n = len(lengths)

    def each_alone(*, x, **parameters):
        outputs = []
        for i, (row, grid) in enumerate(zip(x.split(lengths, 1), system.grids, strict=True)):
            context = system.context(row, Layout(causal=False, grid=grid), slice(i, i + 1))
            outputs.append(functional_call(net, parameters, (row, context)).y)
        return (torch.cat(outputs, dim=1),)

    def together(*, x, **parameters):
        return (functional_call(net, parameters, (x, system.context(x, layout, slice(0, n)))).y,)

    x = torch.randn(1, sum(lengths), system.config.dim, generator=torch.Generator().manual_seed(0)).double()
    given = arguments(net, x)
    assert_equal(results(together, given), results(each_alone, given))


@causal
def test_law_4_no_token_sees_the_future(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    x = system.tokens(2, 8).requires_grad_()
    y = net(x, system.context(x)).y
    (g,) = torch.autograd.grad(y[:, :4].square().sum(), x)
    assert g[:, 4:].abs().max() == 0
    assert (g[:, :4].abs().amax(-1) > 0).all()


@subjects(lambda can, system: can.rows_independent)
def test_law_5_rows_are_independent(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    x = system.tokens(3)
    whole = net(x, system.context(x)).y
    for i in range(3):
        row = x[i : i + 1]
        assert error(net(row, system.context(row, rows=slice(i, i + 1))).y, whole[i : i + 1]) < 1e-9


@every
def test_law_5_runs_repeat_and_change_nothing_in_place(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    x = system.tokens(2)
    context = system.context(x)
    flat = [t for t in torch.utils._pytree.tree_leaves(context) if isinstance(t, torch.Tensor)]
    resumes = net.capabilities.causal and net.capabilities.streaming and not system.train
    state = net(x, context).state if resumes else None
    kept = [t.clone() for t in (*flat, *([] if state is None else state.tensors()))]
    first, second = (net(x, context, state) for _ in range(2))
    assert torch.equal(first.y, second.y)
    now = (*flat, *([] if state is None else state.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@every
def test_law_6_a_gradient_reaches_every_parameter(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    x = system.tokens(2)
    out = net(x, system.context(x))
    (out.y.square().sum() + sum(out.losses.values())).backward()
    for parameter, p in net.named_parameters():
        predictor = parameter.endswith(("predictor.weight", "predictor.bias")) and not system.train
        assert predictor or (p.grad is not None and p.grad.abs().max() > 0), f"no gradient reaches {parameter}"


@pytest.mark.slow
@every
def test_law_6_checkpointing_changes_no_gradient(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    given = arguments(net, system.tokens(2))
    plain = results(call(system, net), given)
    net.set_grad_checkpointing()
    assert_equal(results(call(system, net), given), plain)


@every
def test_law_8_builds_without_memory_and_saves_whole(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    config = from_dict(BackboneConfig, json.loads(json.dumps(to_dict(system.config))))
    assert config == system.config
    with torch.device("meta"):
        shell = Backbone(config)
    assert all(p.is_meta for p in shell.parameters())
    shell.to(torch.float64).to_empty(device="cpu").train(system.train)
    # Tied tensors stand in a state dict under each of their names, and in a file once.
    unique = {id(t): n for n, t in reversed(list(net.state_dict(keep_vars=True).items()))}.values()
    saved = safetensors.torch.load(safetensors.torch.save({n: net.state_dict()[n] for n in unique}))
    same = {n: next(m for m in unique if net.get_parameter(m) is net.get_parameter(n)) for n in net.state_dict()}
    shell.load_state_dict({n: saved[m] for n, m in same.items()})
    x = system.tokens(2)
    assert torch.equal(shell(x, system.context(x)).y, net(x, system.context(x)).y)


@sequential
def test_law_9_the_state_stays_as_small_as_declared(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    sizes = []
    for time in (1, 7, 30):
        x = system.tokens(1, time)
        sizes.append(net(x, system.context(x)).state.nbytes)
    assert (len(set(sizes)) == 1) == net.capabilities.constant_state


@sequential
def test_no_tokens_leave_the_state_as_it_is(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    x = system.tokens(2, 4)
    state = net(x, system.context(x)).state
    out = net(x[:, :0], system.context(x), state)
    assert out.y.shape == (2, 0, system.config.stages[-1].dim if system.config.stages else system.config.dim)
    assert all(error(a, b) == 0 for a, b in zip(out.state.tensors(), state.tensors(), strict=True))


@sequential
def test_only_wanted_tokens_come_out(name):
    system, net = SYSTEMS[name], SYSTEMS[name].backbone()
    if any(t.primes for t in net.transitions.values()):
        return
    x = system.tokens(2)
    whole, index = net(x, system.context(x)), torch.tensor([[2, 8], [0, 8]])
    kept = net(x, system.context(x).replace(keep=index))
    wanted = whole.y.gather(1, index[..., None].expand(-1, -1, whole.y.shape[-1]))
    assert error(kept.y, wanted) < 1e-9
    assert all(error(a, b) == 0 for a, b in zip(kept.state.tensors(), whole.state.tensors(), strict=True))
    assert isinstance(kept.context, Context) and kept.context.positions_of(kept.y).tolist() == index.tolist()


CHECKS = [(name, check) for name, system in SYSTEMS.items() for check in system.checks]


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=[f"{n}-{c.__name__}" for n, c in CHECKS])
def test_what_makes_a_system_itself(name, check):
    check(SYSTEMS[name].backbone())
