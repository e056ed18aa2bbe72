"""What fills rows up at their ends is no token, for layers that count tokens: padded rows are as packed ones."""

from __future__ import annotations

import pytest
import torch

from omnimix import LanguageModel, LanguageModelConfig
from omnimix.backbones import BackboneConfig
from omnimix.backbones.ffn.moe import MoEConfig, expert_loads
from omnimix.backbones.heads.block import BlockDiffusionConfig
from omnimix.backbones.heads.causal import CausalConfig
from omnimix.backbones.heads.masked import MaskedConfig
from omnimix.backbones.heads.sedd import SeddConfig

LENGTHS = (9, 2, 5)
OBJECTIVES = {
    "causal": CausalConfig(),
    "several ahead": CausalConfig(n_future=2),
    "masked": MaskedConfig(),
    "masked, complementary": MaskedConfig(complementary=True),
    "blocks": BlockDiffusionConfig(block=4),
    "blocks of one": BlockDiffusionConfig(block=1, shift=True),
    "sedd": SeddConfig(),
}
each = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def model(objective, router: str = "softmax") -> LanguageModel:
    torch.manual_seed(0)
    ffn = MoEConfig(experts=4, ratio=0.5, router=router, balance=1.0, z_loss=1.0)
    backbone = BackboneConfig(dim=16, depth=2, pattern=["attention"], ffn=ffn)
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11, objective=objective)).double()


def counted(net: LanguageModel, tokens, **options):
    """The loss, and the tokens that each expert was given, by layer."""
    net.eval().train()
    torch.manual_seed(3)
    found = net.loss(tokens, **options)
    return found, expert_loads(net)


@each
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_experts_do_not_meet_what_fills_rows_up(objective, router):
    net, rows, lengths = model(objective, router), torch.randint(11, (3, 9)), torch.tensor(LENGTHS)
    rest = torch.arange(9) >= lengths[:, None]
    packed, borders = rows[~rest][None], torch.tensor([0, 9, 11, 16])
    wanted, loads = counted(net, packed, cu_seqlens=borders)
    for filling in (0, 7):
        found, given = counted(net, rows.masked_fill(rest, filling), lengths=lengths)
        assert found.count == wanted.count and found.parts.keys() == wanted.parts.keys()
        torch.testing.assert_close(found.loss, wanted.loss)
        for name, part in wanted.parts.items():
            torch.testing.assert_close(found.parts[name], part)
        assert all(torch.equal(given[name], load) for name, load in loads.items())
    if isinstance(objective, CausalConfig):
        assert all(load.sum() == sum(LENGTHS) * 2 for load in loads.values())


@each
def test_nor_does_a_likelihood(objective):
    net, rows, lengths = model(objective).eval(), torch.randint(11, (3, 9)), torch.tensor(LENGTHS)
    rest, loads = torch.arange(9) >= lengths[:, None], []
    for filling in (0, 7):
        net.train().eval()
        found = net.objective.log_likelihood(net, rows.masked_fill(rest, filling), lengths=lengths, samples=4)
        loads.append(expert_loads(net))
    assert all(torch.equal(loads[0][name], load) for name, load in loads[1].items())
    for row, length, nats in zip(rows, LENGTHS, found.nats, strict=True):
        alone = net.objective.log_likelihood(net, row[None, :length], samples=4)
        torch.testing.assert_close(nats, alone.nats[0])
