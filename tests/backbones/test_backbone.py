"""The backbone's own parts: configuration, state, taps, stochastic depth, checkpointing."""

import json

import pytest
import torch

import omnimix as om
from omnimix.backbones import Layout, State, from_dict, no_weight_decay, to_dict
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.errors import ConfigError, UnknownName, UnsupportedShape

CAUSAL = Layout(causal=True)


def config(**changes):
    return om.BackboneConfig(**({"dim": 32, "depth": 3, "pattern": ["gla", "attention"]} | changes))


def test_the_example_in_the_design_runs():
    net = om.Backbone(om.BackboneConfig(dim=192, depth=4, pattern=["gla", "gla", "gla", "attention"]))
    x, x_next = torch.randn(2, 6, 192), torch.randn(2, 3, 192)
    out = net(x, om.Layout(causal=True))
    rest = net(x_next, om.Layout(causal=True), out.state)
    whole = net(torch.cat([x, x_next], dim=1), om.Layout(causal=True))
    assert torch.allclose(torch.cat([out.y, rest.y], dim=1), whole.y, atol=1e-5)
    assert rest.state["read"].tolist() == [9, 9]


def test_the_pattern_is_tiled_over_the_depth():
    names = [type(block.mixer).__name__ for block in om.Backbone(config(depth=5)).blocks]
    assert names == ["GLA", "Attention", "GLA", "Attention", "GLA"]


def test_a_config_survives_json():
    before = config(mixers={"gla": GLAConfig(heads=4)}, ffn=None, scan="bidirectional", drop_path=0.1)
    after = from_dict(om.BackboneConfig, json.loads(json.dumps(to_dict(before))))
    assert after == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": ["gal"]}, UnknownName, "did you mean 'gla'"),
        ({"pattern": ["gla+atention"]}, UnknownName, "did you mean 'attention'"),
        ({"pattern": "gla"}, ConfigError, "list"),
        ({"pattern": []}, ConfigError, "list"),
        ({"ffn": "swigl"}, UnknownName, "did you mean 'swiglu'"),
        ({"scan": "bidirectonal"}, UnknownName, "did you mean 'bidirectional'"),
        ({"depth": 0}, ConfigError, "depth is 0"),
        ({"drop_path": 1.0}, ConfigError, "drop_path is 1.0"),
        ({"mixers": {"gla": om.backbones.mixers.get_mixer("linear").config()}}, ConfigError, "must be a GLAConfig"),
    ],
    ids=str,
)
def test_a_wrong_config_says_what_is_wrong(change, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        config(**change)


def test_an_unknown_key_names_the_nearest(without_shape_checks):
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        from_dict(om.BackboneConfig, {"dim": 32, "dpeth": 2})
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        from_dict(om.BackboneConfig, {"dim": 32, "depth": 2, "mixers": {"gla": {"head": 2}}})
    with pytest.raises(ConfigError, match="needs depth"):
        from_dict(om.BackboneConfig, {"dim": 32})
    with pytest.raises(TypeError, match="unexpected keyword"):
        om.BackboneConfig(dim=32, dpeth=1)


def test_taps_are_the_blocks_outputs():
    net = om.Backbone(config()).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    out = net(x, CAUSAL, taps=("blocks.0", "blocks.2"))
    assert set(out.shared) == {"blocks.0", "blocks.2"}
    assert torch.equal(out.y, net.norm(out.shared["blocks.2"])) and torch.equal(out.y, net(x, CAUSAL).y)
    assert torch.equal(net(x, CAUSAL, depth=1).y, net.norm(out.shared["blocks.0"]))


def test_checkpointing_gives_the_same_gradients():
    net = om.Backbone(config()).double()
    gradients = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        x = torch.linspace(-1, 1, 320, dtype=torch.float64).view(2, 5, 32).requires_grad_()
        net(x, CAUSAL)[0].square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_stochastic_depth_drops_whole_sequences_in_training_only():
    net = om.Backbone(config(drop_path=0.9, depth=2))
    x = torch.randn(64, 3, 32)
    assert torch.equal(net.eval()(x, CAUSAL)[0], net(x, CAUSAL)[0])
    last = net.train().blocks[1]
    unchanged = (last(x, CAUSAL)[0] == x).flatten(1).all(1)
    assert 30 < unchanged.sum() < 64
    packed = Layout(cu_seqlens=torch.arange(0, 193, 3))
    y = last(x.reshape(1, 192, 32), packed)[0].view(64, 3, 32)
    same = (y == x).flatten(1)
    assert torch.equal(same.all(1), same.any(1)) and 30 < same.all(1).sum() < 64


def test_weight_decay_spares_vectors_and_what_is_marked():
    names = no_weight_decay(om.Backbone(config(pattern=["mamba2"])))
    assert {"blocks.0.mixer.branches.0.A_log", "blocks.0.mixer_residual.norm.weight", "norm.weight"} <= names
    assert "blocks.0.mixer.in_proj.weight" not in names


def test_state_is_a_tree_of_tensors():
    state = State({"a": torch.zeros(3, 2), "b": State({"c": torch.arange(3)})})
    assert state.nbytes == 24 + 24
    assert state.select(torch.tensor([2, 2, 0]))["b"]["c"].tolist() == [2, 2, 0]
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, state)
    assert isinstance(doubled, State) and doubled["b"]["c"].tolist() == [0, 2, 4]
    tracked = State({"a": torch.ones(1, requires_grad=True)})
    assert not tracked.detach()["a"].requires_grad
    with pytest.raises(AttributeError):
        state.parts = {}


def test_select_reorders_the_sequences_of_a_batch():
    net = om.Backbone(config(pattern=["gla", "window", "attention+mamba2"])).double()
    x, nxt = torch.randn(3, 4, 32, dtype=torch.float64), torch.randn(3, 1, 32, dtype=torch.float64)
    order = torch.tensor([2, 0, 0])
    y = net(nxt, CAUSAL, net(x, CAUSAL).state.select(order)).y
    wanted = net(x[order], CAUSAL).state
    assert torch.allclose(y, net(nxt, CAUSAL, wanted).y, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"causal": "yes"}, "causal"),
        ({"causal": "block"}, "block"),
        ({"block": 4}, "block"),
        ({"grid": (1, 0, 2)}, "grid"),
        ({"extra": (0,)}, "grid is None"),
        ({"grid": (1, 2, 2), "extra": (5,)}, "below 5"),
    ],
    ids=str,
)
def test_a_wrong_layout_says_what_is_wrong(layout, message, without_shape_checks):
    with pytest.raises(ConfigError, match=message):
        Layout(**layout)


def test_a_wrong_shape_says_what_is_wrong():
    net = om.Backbone(config())
    with pytest.raises(UnsupportedShape, match=r"\(1, 4, 31\) is not \(b, t, 32\)"):
        net(torch.randn(1, 4, 31), CAUSAL)
    with pytest.raises(UnsupportedShape, match="says 7"):
        net(torch.randn(1, 6, 32), Layout(causal=True, grid=(1, 2, 3), extra=(0,)))
    state = net(torch.randn(1, 4, 32), CAUSAL).state
    with pytest.raises(UnsupportedShape, match="state holds 1 sequences, and the batch has 2"):
        net(torch.randn(2, 4, 32), CAUSAL, state)


def test_deep_stacks_start_with_small_residual_outputs():
    net = om.Backbone(config(depth=8, pattern=["attention"]))
    out, into = net.blocks[0].mixer.out_proj.weight.std(), net.blocks[0].mixer.in_proj.weight.std()
    assert 0.2 < out / into < 0.3
