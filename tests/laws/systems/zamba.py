"""A block that several depths share, with low-rank corrections of each one's own (Zamba2, arXiv 2411.15242)."""

from __future__ import annotations

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig
from omnimix.backbones.ffn.mlp import MLPConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.mamba2 import Mamba2Config
from omnimix.backbones.wrappers.add_before import AddBeforeConfig
from omnimix.backbones.wrappers.low_rank import LowRankDeltasConfig

from . import System

MAMBA2 = Mamba2Config(heads=2, state_size=4)
SHARED = BlockConfig(
    mixer=LowRankDeltasConfig(inner=AttentionConfig(heads=2), rank=2),
    ffn=MLPConfig(ratio=1.0),
)
HYBRID = BlockConfig(mixer=AddBeforeConfig(inner=MAMBA2, branch=SHARED), ffn=None, residual="none", tie="A")


def depths_share_all_but_their_own(net: Backbone) -> None:
    one, two = (net.blocks[i].mixer for i in (1, 3))
    assert one.branch.ffn.in_proj is two.branch.ffn.in_proj
    attention = [part.branch.mixer.inner for part in (one, two)]
    assert attention[0].in_proj.base is attention[1].in_proj.base
    assert attention[0].in_proj.down is not attention[1].in_proj.down
    assert one.inner.in_proj is not two.inner.in_proj and one.linear is not two.linear
    names = [name for name, _ in net.named_parameters()]
    assert not any(name.startswith("blocks.3.mixer.branch.ffn") for name in names)


SYSTEMS = {
    "zamba2": System(
        config=BackboneConfig(dim=16, depth=4, pattern=(BlockConfig(mixer=MAMBA2, ffn=None), HYBRID)),
        checks=(depths_share_all_but_their_own,),
    ),
    # ALBERT (arXiv 1909.11942): one block at every depth.
    "albert": System(
        config=BackboneConfig(dim=16, depth=3, pattern=(BlockConfig(mixer=AttentionConfig(heads=2), tie="all"),)),
    ),
}
