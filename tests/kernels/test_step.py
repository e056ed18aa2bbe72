"""What a decoding step runs in C++, beside torch's dispatcher: single steps of the recurrences."""

from __future__ import annotations

import pytest
import torch

from omnimix import Backbone, BackboneConfig, Layout, State
from omnimix.backbones.mixers.mamba2 import Mamba2Config
from omnimix.kernels import get_op, native, using
from omnimix.kernels.registry import Draw

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = ("gated_linear", "delta_rule", "short_conv")
pytestmark = pytest.mark.skipif(native.machine_refusal() is not None, reason=str(native.machine_refusal()))


@pytest.fixture
def calls(monkeypatch):
    """The names of the C++ functions called."""
    found = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda op, name, *rest: (found.append(name), call(op, name, *rest))[1])
    return found


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_step_is_the_definitions(calls, name, dtype):
    op = get_op(name)
    for case in op.cases():
        for batch, started in ((1, True), (2, False), (2, True)):
            draw = Draw.seeded(batch, dtype=dtype)
            arguments = case.make(draw, batch, 1)
            if started:
                # A state as batches of beams have it: rows repeated, not contiguous.
                arguments["initial_state"] = case.state(draw, batch).transpose(1, 2).contiguous().transpose(1, 2)
            with torch.no_grad():
                found = op.function(**arguments, backend="native")
                wanted = op.function(**arguments, backend="reference")
            for f, w in zip(found, wanted, strict=True):
                torch.testing.assert_close(f, w, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert calls and all(call.startswith(f"{name}_step_") for call in calls)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", [1, 4])
def test_mamba2s_step_is_its_ops(calls, groups, taps):
    b, h, k, v = 2, 4, 5, 20
    channels, draw = h * v + 2 * groups * k, Draw.seeded()
    config = Mamba2Config(heads=h, state_size=k, groups=groups, conv_size=taps)
    net = Backbone(BackboneConfig(dim=h * v // 2, depth=1, pattern=["mamba2"], mixers={"mamba2": config})).double()
    inner = State({"conv": draw.normal(b, channels, taps - 1), "memory": draw.normal(b, h, k, v)})
    state = State({"read": torch.full((b,), 3), "blocks.0": State({"mixer": inner})})
    x, layout = draw.normal(b, 1, h * v // 2), Layout(causal=True)
    with torch.no_grad():
        found = net(x, layout, state)
        assert calls.count("mamba2_step_double") == 1
        calls.clear()
        with using("chunked"):
            wanted = net(x, layout, state)
    assert calls == []
    after, then = (out.state["blocks.0"]["mixer"] for out in (found, wanted))
    for f, w in ((found.y, wanted.y), (after["conv"], then["conv"]), (after["memory"], then["memory"])):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("keys", "values"), [(8, 64), (3, 100), (16, 16)])
def test_whole_vectors_and_tails_of_values(keys, values):
    draw = Draw.seeded()
    arguments = {
        "q": draw.normal(1, 1, 2, keys),
        "k": draw.normal(1, 1, 2, keys),
        "v": draw.normal(1, 1, 4, values),
        "decay": draw.log_decay(1, 1, 4, keys),
        "initial_state": draw.normal(1, 4, keys, values),
    }
    for name, extra in (("gated_linear", {"bonus": draw.normal(4, keys)}), ("gated_linear", {}), ("delta_rule", {})):
        op = get_op(name)
        with torch.no_grad():
            pairs = (op.function(**arguments, **extra, backend=backend) for backend in ("native", "reference"))
            for found, wanted in zip(*pairs, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_whoever_looks_on_gets_what_the_definition_does(calls):
    op = get_op("mamba2_step")
    arguments = op.cases()[0].make(Draw.seeded(dtype=torch.float64), 2, 1)
    dt = arguments.pop("dt")

    def step(dt: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return op.function(dt=dt, **arguments, backend=backend)[0]

    def derivative(backend: str) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(dt, torch.ones_like(dt))
            return torch.autograd.forward_ad.unpack_dual(step(dual, backend)).tangent

    with torch.no_grad():
        wanted, many = step(dt, "reference"), torch.stack([dt, dt + 1])
        torch.testing.assert_close(torch.jit.trace(lambda x: step(x) + 0, (dt,), check_trace=False)(dt), wanted)
        torch.testing.assert_close(torch.vmap(step)(many)[1], step(many[1], "reference"))
        torch.testing.assert_close(derivative("auto"), derivative("reference"))
        assert calls == []
        torch.testing.assert_close(step(dt), wanted)
    assert calls == ["mamba2_step_double"]
