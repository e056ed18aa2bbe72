"""Learned tokens before every sequence, and two mixers side by side (Hymba, arXiv 2411.13676)."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, Layout, StageConfig
from omnimix.backbones.mixers.attention import AttentionConfig
from omnimix.backbones.mixers.mamba2 import Mamba2Config
from omnimix.backbones.transition.meta import MetaTokensConfig

from . import System


def the_initial_state_is_the_state_after_them(net: Backbone) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    meta = net.transitions["0"].tokens
    state = net.init_state(2, dtype=torch.float64)
    assert state["blocks.0"]["mixer"]["attention"]["count"].tolist() == [3, 3] and state["read"].tolist() == [0, 0]
    out = net(x, Layout(), state)
    bare = Backbone(BackboneConfig(**{**vars(net.config), "stages": ()})).double()
    bare.load_state_dict({n: w for n, w in net.state_dict().items() if not n.startswith("transitions")})
    whole = bare(torch.cat([meta.expand(2, -1, -1), x], 1), Layout())
    assert torch.allclose(out.y, whole.y[:, 3:], atol=1e-10)


SYSTEMS = {
    "hymba": System(
        config=BackboneConfig(
            dim=16,
            depth=2,
            pattern=("attention+mamba2",),
            mixers={"attention": AttentionConfig(heads=2), "mamba2": Mamba2Config(heads=2, state_size=4)},
            stages=(StageConfig(dim=16, depth=2, transition=MetaTokensConfig(tokens=3)),),
        ),
        checks=(the_initial_state_is_the_state_after_them,),
    )
}
