"""Layers conditioned on a time step (DiT, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnimix.backbones import Backbone, BackboneConfig, Layout
from omnimix.backbones.residual.adaln import AdaLNConfig
from omnimix.errors import UnsupportedCall

from . import System


def conditions(sequences: int) -> dict[str, Any]:
    return {"condition": torch.linspace(-1, 1, 60, dtype=torch.float64).view(10, 6)[:sequences]}


def a_condition_is_asked_for(net: Backbone) -> None:
    with pytest.raises(UnsupportedCall, match="condition is None"):
        net(torch.randn(1, 3, 16, dtype=torch.float64), Layout())


def the_condition_acts(net: Backbone) -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    context = SYSTEMS["adaln"].context(x)
    other = context.replace(condition=context.condition + 1)
    assert (net(x, context).y - net(x, other).y).abs().max() > 0.01
    # One condition for each token says the same as one for its sequence.
    each = context.replace(condition=context.condition[:, None].expand(2, 3, 6))
    assert torch.allclose(net(x, each).y, net(x, context).y, atol=1e-12)


SYSTEMS = {
    "adaln": System(
        config=BackboneConfig(dim=16, depth=2, pattern=("gla", "attention"), residual=AdaLNConfig(condition=6)),
        given=conditions,
        checks=(a_condition_is_asked_for, the_condition_acts),
    )
}
