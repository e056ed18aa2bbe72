"""What layers hand to each other: streams, conditions, memories and shared values, and how misuse is refused."""

import dataclasses

import pytest
import torch

import omnimix as om
from omnimix.backbones import BackboneConfig, BlockConfig, Context, Layout, Memory, StageConfig
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.mixers.cross_attention import CrossAttentionConfig
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.backbones.mixers.rwkv7 import RWKV7Config
from omnimix.backbones.residual.adaln import AdaLNConfig
from omnimix.backbones.residual.hyper import HyperConfig
from omnimix.backbones.transition.meta import MetaTokensConfig
from omnimix.backbones.transition.skip import SkipConfig
from omnimix.backbones.wrappers.add_before import AddBeforeConfig
from omnimix.backbones.wrappers.fold import FoldConfig
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig
from omnimix.errors import ConfigError, UnsupportedCall, UnsupportedShape

RANKS = {"decay_rank": 3, "rate_rank": 3, "gate_rank": 3, "value_rank": 2}
RWKV7 = RWKV7Config(heads=2, **RANKS)


def backbone(depth=1, dim=16, **changes):
    torch.manual_seed(0)
    net = om.Backbone(BackboneConfig(**({"dim": dim, "depth": depth, "ffn": None} | changes))).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def stage(dim=16, **changes):
    return StageConfig(dim=dim, depth=1, **changes)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def depths(**block):
    inner = BlockConfig(**({"ffn": None} | block))
    return BlockConfig(mixer=MixtureOfDepthsConfig(block=inner, capacity=0.5), residual="none")


# Streams


def test_streams_of_different_rates_do_not_mix():
    blocks = (BlockConfig(mixer="gla", residual=HyperConfig(rate=2)), BlockConfig(mixer="gla", residual="hyper"))
    with pytest.raises(ConfigError, match=r"different streams: 2 copies, 4 copies"):
        backbone(2, pattern=blocks)


def test_a_block_within_a_layer_opens_and_closes_its_stream():
    branch = BlockConfig(mixer=GLAConfig(heads=2), ffn="mlp", residual=HyperConfig(rate=2, dynamic=False))
    layer = AddBeforeConfig(inner="gla", branch=branch, concat=None)
    net = backbone(pattern=(BlockConfig(mixer=layer, residual="none"),))
    inner, x = net.blocks[0].mixer.branch, tokens(2, 5, 16)
    stream = x[..., None, :].expand(2, 5, 2, 16)
    for _, residual, part in inner.parts():
        stream = residual(stream, part, Context(), None).y
    assert torch.allclose(inner(x, Layout()).y, stream.sum(-2), atol=1e-12)
    assert net(x, Layout()).y.shape == x.shape


def test_depths_need_a_stream_of_tokens():
    with pytest.raises(ConfigError, match="MixtureOfDepthsConfig.block.*4 copies.*'pre'"):
        backbone(pattern=(depths(mixer="gla", residual="hyper"),))


# Experts


def test_experts_run_on_the_meta_device():
    net = om.Backbone(BackboneConfig(dim=32, depth=1, ffn=MoEConfig(experts=4, ratio=0.5))).to("meta")
    assert net(torch.randn(2, 3, 32, device="meta"), Layout()).y.shape == (2, 3, 32)


# Conditions


def conditioned(**changes):
    return backbone(2, pattern=("attention",), residual=AdaLNConfig(condition=6), **changes)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2, 5).double(), "5 channels.*takes 6"),
        (torch.zeros(2, 4, 5).double(), "5 channels.*takes 6"),
        (torch.zeros(3, 6).double(), r"\(3, 6\) is neither \(2, c\)"),
        (torch.zeros(2, 3, 6).double(), r"nor \(2, 4, c\)"),
        (torch.zeros(6).double(), r"\(6,\) is neither"),
        (torch.zeros(1, 2, 4, 6).double(), "is neither"),
        (torch.zeros(2, 6), "torch.float32; it must be torch.float64"),
        (torch.zeros(2, 6, dtype=torch.int64), "torch.int64; it must be floating point"),
    ],
)
def test_a_condition_that_does_not_fit_is_named(condition, message):
    with pytest.raises(UnsupportedShape, match=f"context.condition.*{message}"):
        conditioned()(tokens(2, 4, 16), Context(condition=condition))


def test_packed_sequences_have_a_condition_each():
    net, x = conditioned(), tokens(1, 7, 16)
    packed = Layout(cu_seqlens=torch.tensor([0, 3, 7]))
    for condition in (tokens(4, 6), tokens(1, 6), tokens(2, 7, 6), tokens(1, 2, 6)):
        with pytest.raises(UnsupportedShape, match=r"context.condition.*neither \(2, c\).*nor \(1, 7, c\)"):
            net(x, Context(packed, condition=condition))
    condition = tokens(2, 6)
    each = condition.repeat_interleave(torch.tensor([3, 4]), dim=0)[None]
    y = net(x, Context(packed, condition=condition)).y
    assert torch.allclose(y, net(x, Context(packed, condition=each)).y, atol=1e-12)


def test_autocast_takes_a_condition_in_float32():
    net = conditioned().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(tokens(2, 4, 16).float(), Context(condition=torch.zeros(2, 6))).y.isfinite().all()


def test_meta_tokens_have_a_condition_of_zero_where_each_token_has_its_own():
    net = conditioned(stages=(StageConfig(dim=16, depth=2, transition=MetaTokensConfig(tokens=3)),))
    plain = conditioned()
    plain.load_state_dict({n: w for n, w in net.state_dict().items() if not n.startswith("transitions")})
    meta, x, condition = net.transitions["0"].tokens.detach(), tokens(2, 4, 16), tokens(2, 4, 6)
    longer = torch.cat([meta.expand(2, -1, -1), x], dim=1)
    wanted = plain(longer, Context(condition=torch.cat([torch.zeros(2, 3, 6).double(), condition], dim=1))).y[:, 3:]
    assert torch.allclose(net(x, Context(condition=condition)).y, wanted, atol=1e-12)
    packed = Context(Layout(cu_seqlens=torch.tensor([0, 4, 8])), condition=condition.view(1, 8, 6))
    assert torch.allclose(net(x.view(1, 8, 16), packed).y.view(2, 4, 16), wanted, atol=1e-12)
    first = net(x[:, :1], Context(condition=condition[:, :1]))
    rest = net(x[:, 1:], Context(condition=condition[:, 1:]), first.state)
    assert torch.allclose(torch.cat([first.y, rest.y], dim=1), wanted, atol=1e-12)
    with pytest.raises(UnsupportedCall, match="depends on the condition"):
        net.init_state(2)


# Memories and tensors


def test_a_block_or_the_input_may_be_joined():
    for source, index in (("input", None), ("blocks.0", 0)):
        net = backbone(2, pattern=("gla",), stages=(stage(), stage(transition=SkipConfig(source=source))))
        x = tokens(2, 5, 16)
        before = net.blocks[0](x, Layout()).y
        joined = net.transitions["1"].joined(torch.cat([before, x if index is None else before], dim=-1))
        assert torch.allclose(net(x, Layout()).y, net.norm(net.blocks[1](joined, Layout()).y), atol=1e-12)


def test_cross_attention_reads_memories_only(without_shape_checks):
    for source in ("input", "blocks.0"):
        with pytest.raises(ConfigError, match=f"source is '{source}', which is a tensor.*Memory"):
            CrossAttentionConfig(source=source)
    net = backbone(pattern=(BlockConfig(mixer=CrossAttentionConfig(source="image")),), inputs=("image",))
    x, context = tokens(2, 5, 16), Context(Layout(causal=False), shared={"image": tokens(2, 5, 16)})
    with pytest.raises(UnsupportedCall, match="CrossAttention reads 'image' as a Memory.*holds a Tensor"):
        net(x, context)
    places = torch.zeros(2, 3, dtype=torch.int64)
    for memory, message in (
        (Memory({"x": tokens(2, 4, 16)}, places), "do not all begin with"),
        (Memory({"x": tokens(2, 3, 15)}, places), "15 channels.*takes 16"),
        (Memory({"x": tokens(1, 3, 16)}, places[:1]), "1 sequences, and the tokens 2"),
        ([1, 2], "is a list; it must be a tensor or a Memory"),
        (tokens(2, 4, 16), r"does not begin with \(b, t\)"),
    ):
        with pytest.raises(UnsupportedShape, match=message):
            net(x, context.replace(shared={"image": memory}))
    with pytest.raises(UnsupportedCall, match="reads 'x' of the Memory 'image', which holds 'k'"):
        net(x, context.replace(shared={"image": Memory({"k": tokens(2, 3, 16)}, places)}))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_to_an_empty_memory_is_zero(causal):
    net = backbone(pattern=(BlockConfig(mixer=CrossAttentionConfig(source="image")),), inputs=("image",))
    memory = Memory({"x": tokens(2, 0, 16)}, torch.zeros(2, 0, dtype=torch.int64))
    x = tokens(2, 5, 16).requires_grad_()
    y = net(x, Context(Layout(causal=causal), shared={"image": memory})).y
    assert torch.allclose(y, net.norm(x), atol=1e-12)
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_no_sequences_attend_to_no_memories(causal):
    net = backbone(pattern=(BlockConfig(mixer=CrossAttentionConfig(source="image")),), inputs=("image",))
    memory = Memory({"x": tokens(0, 3, 16)}, torch.zeros(0, 3, dtype=torch.int64))
    assert net(tokens(0, 5, 16), Context(Layout(causal=causal), shared={"image": memory})).y.shape == (0, 5, 16)


@pytest.mark.parametrize("shape", [(0, 6, 16), (2, 0, 16)])
def test_depths_without_tokens_have_no_loss_that_is_no_number(shape):
    out = backbone(pattern=(depths(mixer="gla"),)).train()(tokens(*shape), Layout())
    assert out.y.shape == shape and all(loss.isfinite() for loss in out.losses.values())


def test_a_tie_of_a_block_inside_a_wrapper_is_refused():
    with pytest.raises(ConfigError, match="tie is 'a' of a block inside a wrapper"):
        backbone(2, pattern=(depths(mixer="gla", tie="a"),))


def test_a_mask_has_the_length_of_its_tokens():
    with pytest.raises(UnsupportedShape, match=r"index: shape \(2, 3\) does not fit x, \(2, 4, 16\)"):
        Context().take(torch.ones(2, 3, dtype=torch.bool), tokens(2, 4, 16))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_to_an_earlier_stage_serves_packed_sequences(causal):
    cross = BlockConfig(mixer=CrossAttentionConfig(source="stages.0", heads=2, rope=True))
    net = backbone(2, stages=(stage(pattern=("attention",)), stage(pattern=(cross,))))
    x = tokens(1, 7, 16)
    whole = net(x, Layout(causal=causal, cu_seqlens=torch.tensor([0, 3, 3, 7]))).y
    alone = torch.cat([net(x[:, s], Layout(causal=causal)).y for s in (slice(0, 3), slice(3, 7))], dim=1)
    assert torch.allclose(whole, alone, atol=1e-12)
    state = net(x, Layout()).state
    assert not net.capabilities.streaming
    with pytest.raises(UnsupportedCall, match="CrossAttention in layer 1 does not stream"):
        net(x, Layout(), state)


def test_a_memory_where_a_tensor_is_wanted_is_refused():
    branch = BlockConfig(mixer="gla", ffn=None)
    layer = AddBeforeConfig(inner="gla", branch=branch, concat="stages.0")
    net = backbone(2, stages=(stage(pattern=("gla",)), stage(pattern=(BlockConfig(mixer=layer, residual="none"),))))
    with pytest.raises(UnsupportedCall, match="AddBefore reads 'stages.0' as a tensor.*holds a Memory"):
        net(tokens(1, 4, 16), Layout())


def test_a_skip_says_which_width_it_takes():
    net = backbone(
        2,
        pattern=("gla",),
        stages=(stage(), stage(transition=SkipConfig(source="stages.0", source_dim=8))),
    )
    with pytest.raises(UnsupportedShape, match="16 channels, and SkipConfig.source_dim says 8"):
        net(tokens(1, 4, 16), Layout())


# Values that RWKV-7 shares


def gates(net):
    """By block, whether its RWKV-7 mixes another layer's values into its own."""
    found = [[m.value is not None for m in block.modules() if hasattr(m, "r_proj")] for block in net.blocks]
    return [one[0] if one else None for one in found]


def test_what_some_tokens_wrote_does_not_serve_all():
    net = backbone(4, pattern=(depths(mixer=RWKV7), BlockConfig(mixer=RWKV7)))
    # The first layer of all tokens is the first; the wrapper after it reads what that one wrote.
    assert gates(net) == [False, False, True, True]
    assert net.blocks[0].capabilities.writes == frozenset() and net.blocks[1].capabilities.writes
    assert net(tokens(2, 6, 16), Layout()).y.isfinite().all()
    assert net.eval()(tokens(2, 6, 16), Layout()).y.isfinite().all()


@pytest.mark.parametrize("transition", ["merge", SkipConfig(source="stages.0")])
def test_each_stage_has_values_of_its_own(transition):
    stages = (StageConfig(dim=16, depth=2), StageConfig(dim=24, depth=2, transition=transition))
    net = backbone(4, pattern=(BlockConfig(mixer=RWKV7),), scan="bidirectional", stages=stages)
    assert gates(net) == [False, True, False, True]
    out = net(tokens(1, 12, 16), Layout(causal=False, grid=(1, 3, 4)))
    assert out.y.shape[-1] == 24 and {"first_value/16/0", "first_value/24/1"} <= set(out.shared)


def test_values_of_another_width_or_direction_are_not_read():
    wide = AddBeforeConfig(inner="gla", branch=BlockConfig(mixer=RWKV7, ffn=None))
    net = backbone(2, pattern=(BlockConfig(mixer=wide, residual="none"), BlockConfig(mixer=RWKV7)))
    assert gates(net) == [False, False] and net(tokens(1, 4, 16), Layout()).y.isfinite().all()
    blocks = (BlockConfig(mixer=RWKV7, scan="backward"), BlockConfig(mixer=RWKV7, scan="bidirectional"))
    net = backbone(2, pattern=blocks)
    assert gates(net) == [False, False] and net(tokens(1, 4, 16), Layout(causal=False)).y.isfinite().all()
    plain = BlockConfig(mixer=dataclasses.replace(RWKV7, value_residual=False))
    assert gates(backbone(3, pattern=(plain, BlockConfig(mixer=RWKV7), BlockConfig(mixer=RWKV7)))) == [
        False,
        False,
        True,
    ]


def test_groups_of_cells_have_values_of_their_own():
    folded = BlockConfig(mixer=FoldConfig(inner=RWKV7, groups="rows"))
    net = backbone(3, pattern=(BlockConfig(mixer=RWKV7), folded, BlockConfig(mixer=RWKV7)), scan="bidirectional")
    assert gates(net) == [False, False, True]
    assert net(tokens(1, 6, 16), Layout(causal=False, grid=(1, 2, 3))).y.isfinite().all()
    inner = CrossAttentionConfig(source="image")
    with pytest.raises(ConfigError, match="FoldConfig.inner, CrossAttention, reads 'image'"):
        backbone(pattern=(BlockConfig(mixer=FoldConfig(inner=inner)),), inputs=("image",))


def test_tied_rwkv7_shares_all_but_the_gate_of_the_values():
    net = backbone(3, pattern=(BlockConfig(mixer=RWKV7, tie="a"),))
    first, second, third = (block.mixer.branches[0] for block in net.blocks)
    assert first.value is None and second.value is not third.value
    assert first.r_proj is second.r_proj is third.r_proj and first.shift is third.shift
    assert net.blocks[0].mixer.out_proj is net.blocks[2].mixer.out_proj
    assert net(tokens(1, 4, 16), Layout()).y.isfinite().all()
    other = BlockConfig(mixer=dataclasses.replace(RWKV7, gate_rank=4), tie="a")
    with pytest.raises(ConfigError, match="block 1 differs"):
        backbone(2, pattern=(BlockConfig(mixer=RWKV7, tie="a"), other))


# What nothing uses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ["gla/none"], "ffn": MoEConfig()}, "ffn is MoEConfig.*, which no block uses"),
        ({"pattern": ["gla/none"], "ffn": "mlp"}, "ffn is MLPConfig.*, which no block uses"),
        (
            {"pattern": [BlockConfig(mixer="gla", residual="sandwich")], "residual": "post"},
            "residual is PostConfig.*, which no block uses",
        ),
        ({"pattern": ["attention"], "stages": [stage(pattern=["gla"])]}, "pattern is .*, and each stage has its own"),
        ({"pattern": ["attention"], "scan": "hilbert"}, "scan is 'hilbert', and no mixer.*set 'bidirectional'"),
        ({"pattern": ["attention+linear"], "scan": "columns"}, "scan is 'columns', and no mixer"),
        (
            {"pattern": ["gla", BlockConfig(mixer="attention", scan="hilbert")], "depth": 2},
            "BlockConfig.scan is 'hilbert', and no mixer",
        ),
        (
            {"pattern": [BlockConfig(mixer="gla", scan="bidirectional")], "scan": "cross"},
            "scan is 'cross', and no mixer",
        ),
        ({"pattern": [depths(mixer="gla")], "drop_path": 0.5}, "drop_path is 0.5, and no block can skip.*'none'"),
    ],
    ids=str,
)
def test_what_no_block_uses_is_refused(changes, message, without_shape_checks):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**({"dim": 16, "depth": 1} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": ["gla/none", "gla"], "depth": 2, "ffn": MoEConfig()},
        {"pattern": ["gla/moe"], "ffn": "moe"},
        {"pattern": ["gla/none"], "ffn": None},
        {"pattern": ["attention"], "scan": "bidirectional"},
        {"pattern": ["attention+gla"], "scan": "hilbert"},
        {"pattern": ["attention", "mamba"], "depth": 2, "scan": "cross"},
        {"pattern": [BlockConfig(mixer=FoldConfig(inner="gla"))], "scan": "window"},
        {"pattern": [depths(mixer="gla")], "scan": "hilbert"},
        {"pattern": [depths(mixer="gla"), "gla"], "depth": 2, "drop_path": 0.5},
    ],
    ids=str,
)
def test_what_a_block_uses_is_served(changes):
    assert len(BackboneConfig(**({"dim": 16, "depth": 1} | changes)).layers) == changes.get("depth", 1)


def test_the_last_block_has_the_whole_rate_of_stochastic_depth():
    for depth, rates in ((1, [0.6]), (3, [0.0, 0.3, 0.6])):
        net = backbone(depth, pattern=("gla",), drop_path=0.6)
        assert [block.mixer_residual.drop_path for block in net.blocks] == rates


# Layouts


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"grid": (1, 3.0, 4)}, r"grid is \(1, 3.0, 4\).*integer"),
        ({"grid": (True, 3, 4)}, "grid is .*integer"),
        ({"cu_seqlens": [0, 7, 16]}, r"cu_seqlens is \[0, 7, 16\]; it must be a tensor"),
        ({"grid": ((1, 2, 2.5),), "cu_seqlens": torch.tensor([0, 5])}, "grid is .*integer"),
        ({"causal": "block", "block": 2.0}, "block is 2.0; it must be an integer"),
        ({"causal": "block", "block": torch.tensor([[0, 0, 1], [0, 2, 1]])}, "row 1 descend from 2 to 1 at token 2"),
        (
            {"causal": "block", "block": torch.tensor([[0, 3, 0, 2, 1]]), "cu_seqlens": torch.tensor([0, 2, 5])},
            "row 0 descend from 2 to 1 at token 4",
        ),
        ({"causal": "block", "block": torch.tensor([0, 1])}, r"\(2,\); it must be int64, \(b, t\)"),
        ({"causal": "block", "block": torch.tensor([[0.0, 1.0]])}, "torch.float32 tensor"),
    ],
    ids=str,
)
def test_a_layout_refuses_what_means_nothing(layout, message, without_shape_checks):
    with pytest.raises(ConfigError, match=message):
        Layout(**layout)


def test_block_numbers_begin_anew_in_each_sequence():
    numbers = torch.tensor([[0, 1, 0, 0, 3, 1]])
    for borders in ([0, 2, 5, 6], [0, 0, 2, 2, 5, 6, 6]):
        Layout(causal="block", block=numbers, cu_seqlens=torch.tensor(borders))
    Layout(causal="block", block=numbers[:, :0], cu_seqlens=torch.tensor([0, 0]))
