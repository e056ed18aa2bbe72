"""Initial values follow the width, as in the code that the papers' authors have released.

Expected values are written from facts of state-spaces/mamba (mamba_ssm/modules/mamba_simple.py, mamba2.py,
models/mixer_seq_simple.py), google-deepmind/recurrentgemma (recurrentgemma/torch/layers.py, modules.py, griffin.py) and
BlinkDL/RWKV-LM (RWKV-v7/train_temp/src/model.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, Layout, from_dict, no_weight_decay
from omnimix.backbones.config import Site
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.mixers import get_mixer
from omnimix.backbones.mixers.rwkv7 import RWKV7Config
from omnimix.backbones.wrappers.add_before import AddBeforeConfig
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig

WIDTHS = (64, 256, 768, 2048)
TOKENS = 12


def backbone(dim, depth=1, **options):
    return Backbone(BackboneConfig(dim=dim, depth=depth, **{"ffn": None} | options))


def mixer_of(name, dim):
    """A mixer as it starts in a backbone; the only branch, so that its output is not divided."""
    return backbone(dim, pattern=(name,)).blocks[0].mixer


def update(mixer, dim):
    """The size of what a mixer adds at first to tokens of unit variance."""
    x = torch.randn(1, TOKENS, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return mixer(x, Layout()).y.square().mean().sqrt().item()


def uniform(tensor, bound):
    return nn.init.uniform_(tensor, -bound, bound)


def of_torch(tensor):
    """torch's default for weights (out, in), which mamba_ssm keeps."""
    return uniform(tensor, tensor.shape[-1] ** -0.5)


def steps(bias):
    """The inverse of softplus of steps that are log-uniform in [0.001, 0.1]."""
    dt = torch.rand_like(bias).mul(math.log(0.1) - math.log(0.001)).add(math.log(0.001)).exp()
    bias.copy_(dt.expm1().log())


def mamba(mixer, dim):
    (branch,) = mixer.branches
    for layer in (mixer.in_proj, branch.x_proj, mixer.out_proj):
        of_torch(layer.weight)
    uniform(branch.conv_weight, 0.5)
    uniform(branch.conv_bias, 0.5)
    uniform(branch.dt_proj.weight, math.ceil(dim / 16) ** -0.5)
    steps(branch.dt_proj.bias)
    branch.A_log.copy_(torch.arange(1.0, 17).log().expand(2 * dim, 16))
    branch.D.fill_(1)


def mamba2(mixer, dim):
    (branch,) = mixer.branches
    of_torch(mixer.in_proj.weight)
    of_torch(mixer.out_proj.weight)
    uniform(branch.conv_weight, 0.5)
    uniform(branch.conv_bias, 0.5)
    steps(branch.dt_bias)
    branch.A_log.copy_(torch.empty_like(branch.A_log).uniform_(1, 16).log())
    branch.D.fill_(1)
    mixer.norm.weight.fill_(1)


def rglru(mixer, dim):
    """With the output of a stack of one block: a variance of 2 / depth over the inner width, for two branches."""
    (branch,) = mixer.branches
    inner = mixer.out_proj.in_features
    mixer.in_proj.weight.normal_(std=dim**-0.5)
    # One branch, of which there are two in the released blocks.
    mixer.out_proj.weight.normal_(std=math.sqrt(2) * math.sqrt(2 / inner))
    branch.conv_weight.normal_(std=math.sqrt(0.01 / 4))
    branch.conv_bias.zero_()
    branch.gate_weight.normal_(std=(inner // 16) ** -0.5)
    branch.gate_bias.zero_()
    # There a = exp(-softplus(p)) with p the inverse of softplus of -log a; here a = sigmoid(p).
    a = torch.empty_like(branch.decay).uniform_(0.9**2, 0.999**2).sqrt()
    branch.decay.copy_(a.logit())


OFFICIAL = {"mamba": mamba, "mamba2": mamba2, "rglru": rglru}


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_first_update_has_the_published_size_at_every_width(name, dim):
    mixer = mixer_of(name, dim)
    own = update(mixer, dim)
    with torch.no_grad():
        for p in mixer.parameters():
            # What is not set is not left as it was.
            p.fill_(math.nan)
        OFFICIAL[name](mixer, dim)
    assert 0.8 < own / update(mixer, dim) < 1.25


def within(tensor, low, high):
    """Values fill an interval: the ends are near, and none is outside."""
    reach = high - low
    return low <= tensor.min() <= low + 0.05 * reach and high - 0.05 * reach <= tensor.max() <= high


@pytest.mark.parametrize("dim", (64, 768))
def test_linear_layers_and_experts_start_as_torch_s(dim):
    net = backbone(dim, pattern=("attention",), ffn=MoEConfig(experts=2, active=1, ratio=0.25, shared=1))
    std = {name: p.std().item() for name, p in net.blocks[0].named_parameters() if p.ndim > 1}
    hidden = net.blocks[0].ffn.out_proj.weight.shape[1]
    for name, inputs, branches in (
        ("mixer.in_proj.weight", dim, 1),
        ("mixer.out_proj.weight", dim, 2),
        ("ffn.router.weight", dim, 1),
        ("ffn.in_proj.weight", dim, 1),
        ("ffn.out_proj.weight", hidden, 2),
        ("ffn.shared.in_proj.weight", dim, 1),
        ("ffn.shared.out_proj.weight", hidden, 2),
    ):
        assert std[name] == pytest.approx((3 * inputs * branches) ** -0.5, rel=0.15), name


def branches_of(net):
    """By what the square of the first mixer's output weight was divided."""
    fan_in = net.blocks[0].mixer.out_proj.in_features
    return 1 / (3 * fan_in * net.blocks[0].mixer.out_proj.weight.var().item())


@pytest.mark.parametrize(
    ("options", "branches"),
    [
        ({"ffn": None}, 6),
        ({"ffn": "swiglu"}, 12),
        ({"pattern": ("gla/none", "gla/mlp", "none/mlp")}, 8),
        # Shared weights are divided once, by the root of how often they add to the stream.
        ({"pattern": (BlockConfig(mixer="gla", ffn=None, tie="a"),)}, 6),
    ],
    ids=["mixers", "both", "some", "tied"],
)
def test_outputs_are_divided_by_the_root_of_the_branches(options, branches):
    net = backbone(128, depth=6, **{"pattern": ("gla",)} | options)
    assert sum(block.residual_branches() for block in net.blocks) == branches
    assert branches_of(net) == pytest.approx(branches, rel=0.1)


def test_branches_within_wrappers_count():
    inner = BlockConfig(mixer="attention", ffn="mlp")
    skipped = BlockConfig(mixer=MixtureOfDepthsConfig(block=inner), ffn=None, residual="none")
    added = BlockConfig(mixer=AddBeforeConfig(inner="gla", branch=inner), ffn=None, residual="none")
    net = backbone(32, depth=4, pattern=("attention", "attention+gla", skipped, added))
    assert [block.residual_branches() for block in net.blocks] == [1, 1, 2, 3]
    assert branches_of(net) == pytest.approx(7, rel=0.2)


def test_the_convolutions_of_mamba_start_as_torch_s():
    for name in ("mamba", "mamba2"):
        (branch,) = mixer_of(name, 128).branches
        assert within(branch.conv_weight, -0.5, 0.5) and within(branch.conv_bias, -0.5, 0.5)


def test_the_decays_of_gated_deltanet_reach_down_to_0_and_those_of_kda_to_1():
    for name, least in (("gated_deltanet", 0.0), ("kda", 1.0)):
        mixer = get_mixer(name).build(2048, get_mixer(name).config(heads=256), Site())
        rates = mixer.branches[0].step.log_rate.exp()
        assert within(rates, least, 16.001) and rates.log().isfinite().all()


def test_rglru_starts_as_released():
    net = backbone(192, depth=6, pattern=("rglru",), ffn="swiglu")
    mixer = net.blocks[0].mixer
    (branch,), inner = mixer.branches, mixer.out_proj.in_features
    assert mixer.in_proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx(math.sqrt(2 / 6 / inner), rel=0.05)
    assert branch.conv_weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert branch.gate_weight.std().item() == pytest.approx((inner / 16) ** -0.5, rel=0.05)
    a = branch.decay.sigmoid()
    assert within(a, 0.9, 0.999001)
    # Uniform by area: the mean of a² is in the middle.
    assert a.square().mean().item() == pytest.approx((0.9**2 + 0.999**2) / 2, rel=0.02)
    assert not branch.conv_bias.any() and not branch.gate_bias.any()


def vectors(dim, size, layer, depth):
    """RWKV-7's initial vectors, channel by channel."""
    deep = layer / (depth - 1)
    found = {name: [] for name in ("decay", "rate", "value", "removal")}
    for n in range(dim):
        linear, middle = n / (dim - 1) - 0.5, (size - 1) / 2
        zigzag = (n % size - middle) / middle
        zigzag *= abs(zigzag)
        found["decay"].append(-6 + 6 * (n / (dim - 1)) ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag)
        found["rate"].append(-0.19 + 0.3 * zigzag + 0.4 * linear)
        found["value"].append(0.73 - 0.4 * linear)
        found["removal"].append(0.71 - 0.1 * linear)
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize("layer", range(3))
def test_rwkv7_starts_as_released(layer):
    dim = 128
    net = backbone(dim, depth=3, pattern=("rwkv7",), ffn="rwkv")
    mixer, ffn = net.blocks[layer].mixer, net.blocks[layer].ffn
    (branch,) = mixer.branches
    expected = vectors(dim, 64, layer, 3)
    found = {"decay": branch.decay.bias, "rate": branch.rate.bias, "removal": branch.removal}
    if layer:
        found["value"] = branch.value.bias
    for name, vector in found.items():
        torch.testing.assert_close(vector.detach(), expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert (branch.replace == 1.02).all() and (branch.bonus == -0.04).all()
    torch.testing.assert_close(branch.norm.weight.detach(), torch.full((dim,), ((layer + 1) / 3) ** 0.7))
    for weight, bound in ((branch.r_proj, 0.5), (branch.k_proj, 0.05), (branch.v_proj, 0.5), (ffn.in_proj, 0.5)):
        assert within(weight.weight, -bound * dim**-0.5, bound * dim**-0.5)
    assert not mixer.out_proj.weight.any() and not ffn.out_proj.weight.any()
    for low_rank in (branch.decay, branch.rate, branch.gate, *([branch.value] if layer else [])):
        assert not low_rank.down.weight.any()
        gram = low_rank.up.weight.mT @ low_rank.up.weight
        torch.testing.assert_close(gram.detach(), 0.01 * torch.eye(len(gram)), atol=1e-6, rtol=0)


def test_low_rank_matrices_do_not_decay():
    names = no_weight_decay(backbone(128, depth=2, pattern=("rwkv7",)))
    matrices = [f"{name}.{way}.weight" for name in ("decay", "rate", "gate", "value") for way in ("down", "up")]
    assert {f"blocks.1.mixer.branches.0.{matrix}" for matrix in matrices} <= names
    assert "blocks.1.mixer.branches.0.r_proj.weight" not in names


def test_a_wide_low_rank_matrix_has_the_released_gain():
    mixer = get_mixer("rwkv7").build(16, RWKV7Config(heads=2, gate_rank=64), Site())
    up = mixer.branches[0].gate.up.weight
    torch.testing.assert_close((up @ up.mT).detach(), 0.04 * torch.eye(16), atol=1e-6, rtol=0)


# Width -> ranks for the decay and the rate, the gate, and the value.
RANKS = {64: (32, 32, 32), 192: (32, 64, 32), 768: (64, 128, 32), 2048: (128, 224, 64), 4096: (160, 320, 96)}


@pytest.mark.parametrize("dim", RANKS)
def test_rwkv7_has_the_released_ranks(dim):
    with torch.device("meta"):
        branch = backbone(dim, depth=2, pattern=("rwkv7",)).blocks[1].mixer.branches[0]
    parts = (branch.decay, branch.rate, branch.gate, branch.value)
    decay, gate, value = RANKS[dim]
    assert [part.down.out_features for part in parts] == [decay, decay, gate, value]


def test_configurations_of_0_1_keep_their_ranks():
    old = {"dim": 768, "depth": 1, "pattern": ["rwkv7"], "mixers": {"rwkv7": {"heads": 4, "rate_rank": 9}}}
    config = from_dict(BackboneConfig, old | {"channel": None, "channels": {}})
    ranks = {"decay_rank": 64, "rate_rank": 9, "gate_rank": 128, "value_rank": None}
    assert vars(config.mixers["rwkv7"]) == {"heads": 4, "value_residual": False} | ranks
    wide = from_dict(BackboneConfig, {**old, "dim": 2048, "mixers": {}, "channel": None})
    assert (wide.mixers["rwkv7"].decay_rank, wide.mixers["rwkv7"].gate_rank) == (96, 256)


def released_rwkv7(mixer, dim):
    (branch,) = mixer.branches
    start = vectors(dim, 64, 0, 2)
    uniform(branch.r_proj.weight, 0.5 * dim**-0.5)
    uniform(branch.k_proj.weight, 0.05 * dim**-0.5)
    uniform(branch.v_proj.weight, 0.5 * dim**-0.5)
    for name in ("decay", "rate", "gate"):
        low_rank = getattr(branch, name)
        low_rank.down.weight.zero_()
        nn.init.orthogonal_(low_rank.up.weight, gain=0.1)
        if name != "gate":
            low_rank.bias.copy_(start[name])
    powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
    branch.shift.copy_(1 - (torch.arange(dim) / dim) ** powers[:, None])
    branch.removal.copy_(start["removal"])
    branch.replace.fill_(1.02)
    branch.bonus.fill_(-0.04)
    branch.norm.weight.fill_(0.5**0.7)
    branch.norm.bias.zero_()


@pytest.mark.parametrize("dim", WIDTHS[:3])
def test_what_rwkv7_projects_has_the_published_size_at_every_width(dim):
    mixer = backbone(dim, depth=2, pattern=("rwkv7",)).blocks[0].mixer
    assert update(mixer, dim) == 0
    mixer.out_proj = nn.Identity()
    own = update(mixer, dim)
    with torch.no_grad():
        for p in mixer.parameters():
            p.fill_(math.nan)
        released_rwkv7(mixer, dim)
    assert 0.8 < own / update(mixer, dim) < 1.25
