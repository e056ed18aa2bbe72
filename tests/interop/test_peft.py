"""peft's adapters on our models: every call goes through them, in training and in decoding."""

import pytest
import torch
from torch import nn

from omnimix.backbones import BackboneConfig, LanguageModel, LanguageModelConfig, Layout
from omnimix.interop.importing import source_hidden

# In a clone it would take the folder `kernels` for a package of that name.
with source_hidden():
    peft = pytest.importorskip("peft")


def adapted(pattern: str):
    """A language model, its twin with LoRA on all linear layers of its blocks, and what these are called."""
    backbone = BackboneConfig(dim=48, depth=2, pattern=tuple(pattern.split(",")))
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=64)).double().eval()
    twin = LanguageModel(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    layers = [name for name, m in twin.named_modules() if type(m) is nn.Linear and name.startswith("backbone.")]
    found = peft.get_peft_model(twin, peft.LoraConfig(r=4, target_modules=layers))
    return model, twin, found


@pytest.mark.parametrize("pattern", ["attention", "gla", "mamba", "gated_deltanet", "mamba2/moe"])
def test_adapters_are_trained_and_take_part_in_decoding(pattern):
    model, twin, found = adapted(pattern)
    tokens = torch.randint(64, (2, 9))
    layout = Layout(causal=True)
    # An adapter starts as zero.
    torch.testing.assert_close(twin.hidden(tokens, layout).y, model.hidden(tokens, layout).y)
    found.train()
    twin.loss(tokens).loss.backward()
    trained = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    assert all(p.grad is None for p in found.parameters() if not p.requires_grad)
    found.eval()
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
        whole = twin.hidden(tokens, layout)
        assert (whole.y - model.hidden(tokens, layout).y).abs().max() > 1e-3
        first = twin.hidden(tokens[:, :8], layout)
        last = twin.hidden(tokens[:, 8:], layout, first.state)
        torch.testing.assert_close(last.y, whole.y[:, 8:])
        # Merged into the weights, they do the same.
        merged = found.merge_and_unload()
        torch.testing.assert_close(merged.hidden(tokens, layout).y, whole.y)
