"""Laws of feed-forward layers, for every registered one, and what `moe` promises beyond them."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import omnimix as om
from omnimix import kernels
from omnimix.backbones import from_dict, to_dict
from omnimix.backbones.config import Site
from omnimix.backbones.ffn import FFNS, expert_loads, list_ffns, rebalance
from omnimix.backbones.ffn.moe import MoE, MoEConfig
from omnimix.cli.check_kernels import low_precision_excess, results
from omnimix.errors import ConfigError

from ..laws.checker import assert_equal

DIM = 32
PLAIN = om.Context()
SUBJECTS = [(name, i) for name in list_ffns() for i in range(len(FFNS.get(name).examples))]
ffns = pytest.mark.parametrize(("name", "example"), SUBJECTS)


def built(name, example):
    entry = FFNS.get(name)
    return entry.build(DIM, entry.examples[example], Site())


def layer(name, example, dtype=torch.float64):
    torch.manual_seed(1)
    module = built(name, example)
    with torch.no_grad():
        for p in module.parameters():
            # Published initial values hide mistakes.
            p.copy_(torch.randn_like(p) * (p.shape[-2] if p.ndim > 2 else p.shape[-1]) ** -0.5)
    return module.to(dtype)


def call(module):
    def function(*, x, **parameters):
        out = functional_call(module, parameters, (x, PLAIN))
        return (out.y, *out.losses.values())

    return function


def given(module, *shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": x.to(dtype)} | dict(module.named_parameters())


def on_backend(backend, function):
    def run(**arguments):
        with kernels.using(backend):
            return function(**arguments)

    return run


TOKENWISE = [(n, i) for n, i in SUBJECTS if built(n, i).capabilities.receptive_field == 1]


@pytest.mark.parametrize(("name", "example"), TOKENWISE)
def test_each_token_is_mixed_alone(name, example):
    module = layer(name, example)

    def one_by_one(*, x, **parameters):
        each = x.flatten(0, 1)[:, None, None].unbind(0)
        rows = [functional_call(module, parameters, (token, PLAIN)).y for token in each]
        return (torch.cat(rows).view_as(x),)

    arguments = given(module, 2, 7)
    assert_equal(results(lambda **a: call(module)(**a)[:1], arguments), results(one_by_one, arguments))


@ffns
def test_no_tokens_are_legal(name, example):
    module = layer(name, example)
    for shape in ((2, 0), (0, 3)):
        assert module(given(module, *shape)["x"], PLAIN).y.shape == (*shape, DIM)


@ffns
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_the_fast_path_is_the_reference(name, example, backend):
    module = layer(name, example)
    function, arguments = call(module), given(module, 2, 9)
    assert_equal(
        results(on_backend(backend, function), arguments), results(on_backend("reference", function), arguments)
    )


@ffns
def test_a_gradient_reaches_every_parameter(name, example):
    module = layer(name, example)
    module(given(module, 2, 9)["x"], PLAIN).y.square().sum().backward()
    for parameter, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"no gradient reaches {parameter}"


@ffns
def test_repeats_to_the_bit(name, example):
    module = layer(name, example)
    first, second = (results(call(module), given(module, 3, 9)).named() for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())


@ffns
def test_checkpointing_changes_no_gradient(name, example):
    module = layer(name, example)
    arguments = given(module, 2, 5)
    again = results(lambda **a: checkpoint(call(module), use_reentrant=False, **a), arguments)
    assert_equal(again, results(call(module), arguments))


@ffns
def test_low_precision_costs_no_more_than_it_must(name, example):
    exact, rounded = layer(name, example), layer(name, example, torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    x = given(rounded, 2, 40, dtype=torch.bfloat16)["x"]
    truth = results(call(exact), given(exact, 0) | {"x": x.double()}).named()
    function, arguments = call(rounded), given(rounded, 0) | {"x": x}
    plain = results(on_backend("reference", function), arguments).named()
    for key, found in results(function, arguments).named().items():
        assert low_precision_excess(found, plain[key], truth[key]) <= 1, f"{key} is imprecise in bfloat16"


@ffns
def test_large_inputs_stay_finite(name, example):
    module = layer(name, example, torch.bfloat16)
    arguments = given(module, 1, 4096, dtype=torch.bfloat16)
    for key, x in results(call(module), arguments | {"x": arguments["x"] * 100}).named().items():
        assert x.isfinite().all(), f"{key} is not finite"


@ffns
def test_runs_under_autocast(name, example):
    module = layer(name, example, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(given(module, 2, 5, dtype=torch.float32)["x"], PLAIN).y
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@ffns
def test_builds_without_memory_and_saves_whole(name, example):
    module = layer(name, example)
    with torch.device("meta"):
        shell = built(name, example)
    assert all(p.is_meta for p in shell.parameters())
    saved = safetensors.torch.save(module.state_dict())
    shell.to(torch.float64).to_empty(device="cpu").load_state_dict(safetensors.torch.load(saved))
    x = given(module, 2, 5)["x"]
    assert torch.equal(shell(x, PLAIN).y, module(x, PLAIN).y)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == module.state_dict().keys()


@ffns
def test_deep_stacks_start_with_small_residual_outputs(name, example):
    torch.manual_seed(0)
    config = om.BackboneConfig(dim=DIM, depth=8, ffn=FFNS.get(name).examples[example])
    for block in om.Backbone(config).blocks:
        outputs = block.ffn.residual_outputs()
        assert outputs
        for weight in (output.weight for output in outputs):
            # Channel mixing is published with an output of zeros; weights of experts are (experts, in, out).
            inputs = weight.shape[-2] if weight.ndim > 2 else weight.shape[-1]
            std = 0.0 if name == "rwkv" else (3 * inputs) ** -0.5 / 4
            assert weight.std().item() == pytest.approx(std, rel=0.2)


@ffns
def test_a_config_survives_json(name, example):
    before = om.BackboneConfig(dim=DIM, depth=1, ffn=FFNS.get(name).examples[example])
    assert from_dict(om.BackboneConfig, to_dict(before)) == before


def moe(**options):
    torch.manual_seed(1)
    return MoE(DIM, MoEConfig(**({"experts": 8, "active": 2, "ratio": 0.25} | options)), Site()).double()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, lambda logits, chosen: logits.gather(1, chosen).softmax(-1)),  # Mixtral
        ({"active": 1}, lambda logits, chosen: logits.softmax(-1).gather(1, chosen)),  # Switch
        (
            {"router": "sigmoid", "scale": 2.5},  # DeepSeek-V3
            lambda logits, chosen: 2.5 * torch.nn.functional.normalize(logits.sigmoid().gather(1, chosen), p=1),
        ),
    ],
    ids=["mixtral", "switch", "deepseek"],
)
def test_the_layer_is_the_papers_formula(options, weights):
    module = moe(**options)
    x = torch.randn(6, DIM, dtype=torch.float64)
    logits = x @ module.router.weight.t()
    chosen = logits.topk(module.config.active).indices
    wanted = torch.zeros_like(x)
    for i, (choices, row) in enumerate(zip(chosen.tolist(), weights(logits, chosen), strict=True)):
        for e, w in zip(choices, row, strict=True):
            gate, value = (x[i] @ module.in_proj.weight[e]).chunk(2)
            wanted[i] += w * ((torch.nn.functional.silu(gate) * value) @ module.out_proj.weight[e])
    torch.testing.assert_close(module(x[None], PLAIN).y[0], wanted, rtol=1e-10, atol=1e-14)


def test_losses_are_weighted_and_known_where_experts_are_even():
    module = moe(balance=0.5, z_loss=0.25)
    torch.nn.init.zeros_(module.router.weight)
    losses = module(torch.randn(1, 6, DIM, dtype=torch.float64), PLAIN).losses
    # Even probabilities: Σ f P is 1 / N whatever the choice, and log Σ e⁰ is log N.
    assert losses["load_balance"].item() == pytest.approx(0.5)
    assert losses["router_z"].item() == pytest.approx(0.25 * torch.tensor(8.0).log().item() ** 2)


def test_a_backbone_returns_the_sum_of_its_layers_losses():
    net = om.Backbone(om.BackboneConfig(dim=DIM, depth=2, ffn=MoEConfig(balance=1.0)))
    out = net(torch.randn(1, 6, DIM), om.Layout(causal=True))
    assert set(out.losses) == {"load_balance", "router_z"}
    assert out.losses["load_balance"] > 1.5
    sum(out.losses.values()).backward()
    assert all(block.ffn.router.weight.grad.abs().max() > 0 for block in net.blocks)


def collapsed(**options):
    """A layer of which one expert gets nearly every token, and tokens."""
    module, x = moe(**options), torch.randn(4, 64, DIM, dtype=torch.float64)
    x[..., 0] = 4
    with torch.no_grad():
        module.router.weight.normal_(std=0.05)
        module.router.weight[0, 0] = 1.0
    return module, x


def unevenness(module, x):
    module.eval().train()
    module(x, PLAIN)
    (load,) = expert_loads(module).values()
    assert load.sum() == x[..., 0].numel() * module.config.active
    return (load.max() / load.double().mean()).item()


def test_the_bias_balances_the_load_and_leaves_the_weights_alone():
    module, x = collapsed(router="sigmoid", bias_rate=0.01)
    before = unevenness(module, x)
    for _ in range(100):
        module(x, PLAIN)
        rebalance(module)
    assert before > 3 and unevenness(module, x) < 1.4
    # The bias chooses; it is no part of the weight.
    weight = module._choose(module._logits(x.flatten(0, 1)))[1]
    torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[:, 0]))


def test_the_loss_balances_the_load():
    module, x = collapsed(balance=1.0, z_loss=0.0)
    before = unevenness(module, x)
    optimizer = torch.optim.Adam([module.router.weight], lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        sum(module(x, PLAIN).losses.values()).backward()
        optimizer.step()
    assert before > 3 and unevenness(module, x) < 1.5


def test_checkpointing_counts_twice_and_moves_the_bias_once():
    module, x = collapsed(router="sigmoid")
    plain, twice = copy.deepcopy(module), copy.deepcopy(module)
    plain(x, PLAIN).y.sum().backward()
    checkpoint(lambda x: twice(x, PLAIN).y, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert torch.equal(twice.load, 2 * plain.load)
    for m in (plain, twice):
        rebalance(m)
        assert m.load.sum() == 0 and m.bias[0] == -0.001
    assert torch.equal(plain.bias, twice.bias)


def test_the_load_of_evaluation_is_its_own():
    module, x = collapsed()
    module(x, PLAIN)
    assert module.load.sum() > 0
    module.eval()
    assert module.load.sum() == 0
    module(x, PLAIN)
    assert module.load.sum() > 0
    module.load_state_dict(module.state_dict())
    assert module.load.sum() == 0
    assert "load" not in module.state_dict()


def test_the_bias_is_a_float_that_nothing_rounds():
    module, x = collapsed(router="sigmoid", bias_rate=0.0)
    bias = torch.randn(8) * 1e-3
    module.load_state_dict(module.state_dict() | {"bias": bias})
    assert torch.equal(module.bias, bias)
    for converted in (copy.deepcopy(module).bfloat16(), copy.deepcopy(module).half().float(), module.double()):
        assert converted.bias.dtype == torch.float32 and torch.equal(converted.bias, bias)
    with torch.device("meta"):
        shell = moe(router="sigmoid")
    assert shell.to_empty(device="cpu").bfloat16().bias.device.type == "cpu"
    # The bias of a checkpoint decides, to the last digit.
    logits = module._logits(x.flatten(0, 1))
    chosen, _, scores = module._choose(logits)
    assert torch.equal(chosen, (scores + bias.double()).topk(2).indices)


def test_a_bias_in_steps_loads_as_a_float():
    module = moe(router="sigmoid", bias_rate=0.01)
    state = module.state_dict()
    del state["bias"]
    module.load_state_dict(state | {"steps": torch.arange(-3, 5, dtype=torch.int32)})
    torch.testing.assert_close(module.bias, torch.arange(-3, 5) * 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 9}, "active is 9; there are 8 experts"),
        ({"experts": 0}, "experts is 0"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"router": "softmx"}, "router is 'softmx'"),
        ({"active": 1, "normalise": True}, "normalise"),
        ({"shared": -1}, "shared is -1"),
        ({"balance": -0.1}, "balance is -0.1"),
    ],
    ids=str,
)
def test_a_wrong_config_says_what_is_wrong(options, message, without_shape_checks):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**options)
