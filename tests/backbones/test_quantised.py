"""torch's dynamic quantisation: every linear layer is quantised, and the answers stay near."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import omnimix as om
from omnimix.backbones import list_mixers
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.mixers import get_mixer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_linear_layer_is_quantised(mixer: str):
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    ffn = MoEConfig(experts=4) if mixer == "gla" else "swiglu"
    options = {mixer: get_mixer(mixer).examples[0]}
    backbone = om.BackboneConfig(dim=48, depth=2, pattern=(mixer,), mixers=options, ffn=ffn)
    model = om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=23)).eval()
    quantised = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(m, nn.Linear) for m in quantised.modules())
    assert sum(isinstance(m, Linear) for m in quantised.modules()) == sum(
        isinstance(m, nn.Linear) for m in model.modules()
    )
    ids = torch.arange(40).view(2, 20) % 23
    with torch.no_grad():
        wanted, _ = model(ids)
        found, state = quantised(ids)
        next_logits, _ = quantised(ids[:, :1], state)
        loss = quantised.loss(ids).loss - model.loss(ids).loss
    # Eight bits a tensor cost 4 to 32 % through two layers of this width; a layer that is passed over costs all.
    assert (found - wanted).norm() < 0.4 * wanted.norm()
    assert next_logits.isfinite().all() and loss.abs() < 0.05
