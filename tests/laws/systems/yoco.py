"""One cache of keys and values for the upper half, and prefill that exits before it (YOCO, arXiv 2405.05254)."""

from __future__ import annotations

import torch

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, StageConfig
from omnimix.backbones.mixers.cross_attention import CrossAttentionConfig
from omnimix.backbones.mixers.window import WindowConfig
from omnimix.backbones.transition.kv import SharedKVConfig

from . import System


def prefill_exits_early(net: Backbone) -> None:
    system = SYSTEMS["yoco"]
    x = system.tokens(2)
    context = system.context(x)
    seen = []
    hook = net.blocks[-1].register_forward_pre_hook(lambda block, given: seen.append(given[0].shape[1]))
    out = net(x, context.replace(keep=torch.tensor([[8], [8]])))
    hook.remove()
    assert seen == [1] and torch.allclose(out.y, net(x, context).y[:, -1:], atol=1e-10)


def only_the_lower_half_has_states(net: Backbone) -> None:
    state = net.init_state(1)
    assert set(state) == {"read", "blocks.0", "transitions.1"}


SYSTEMS = {
    "yoco": System(
        config=BackboneConfig(
            dim=16,
            depth=3,
            stages=(
                StageConfig(dim=16, depth=1, pattern=(BlockConfig(mixer=WindowConfig(heads=2, window=4)),)),
                StageConfig(
                    dim=16,
                    depth=2,
                    pattern=(
                        BlockConfig(
                            mixer=CrossAttentionConfig(source="kv", heads=2, kv_heads=1, projected=True, rope=True)
                        ),
                    ),
                    transition=SharedKVConfig(heads=2, kv_heads=1),
                ),
            ),
        ),
        checks=(prefill_exits_early, only_the_lower_half_has_states),
    )
}
