"""Law: every linear layer is called, and no weight is read past its module.

Adapters, offloading, quantisation and hooks stand in a layer's place. What they do must count in outputs and gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from omnimix.backbones import BackboneConfig, Context, Layout, list_ffns
from omnimix.backbones.config import Site
from omnimix.backbones.ffn import FFNS
from omnimix.backbones.heads import get_objective, list_objectives
from omnimix.backbones.language import LanguageModel, LanguageModelConfig
from omnimix.cli.check_kernels import error
from omnimix.modalities import AudioTokenizer, AudioTokenizerConfig, list_fronts
from omnimix.modalities.audio.fronts import FRONTS

from .subjects import BOTH, CAUSAL, Subject, causal_subjects, floating, subjects, tokens
from .zeros import without_zeros


class Adapter(nn.Module):
    """A linear layer with a correction of low rank, as adapters are; it shares no class or attribute with the layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype}
        self.down = nn.Parameter(torch.randn(2, base.weight.shape[1], **like) * 0.3)
        self.up = nn.Parameter(torch.randn(base.weight.shape[0], 2, **like) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight = nn.Parameter(self.base.weight + self.up @ self.down)
        return self.base


def layers(module: nn.Module, kind: type) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each layer of a kind, with where it stands."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                yield parent, name, child


def holds(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Each layer wrapped: a gradient reaches its adapter, and merging the adapters changes no output."""
    plain = run(module)
    assert [m for m in module.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear] == []
    wrapped = copy.deepcopy(module)
    for parent, name, layer in layers(wrapped, nn.Linear):
        if not layer.weight.any():  # nothing has a gradient behind zeros
            nn.init.normal_(layer.weight, std=0.1)
        setattr(parent, name, Adapter(layer))
    adapters = [adapter for _, _, adapter in layers(wrapped, Adapter)]
    assert adapters
    adapted = run(wrapped)
    adapted.square().sum().backward()
    for name, p in wrapped.named_parameters():
        if name.endswith((".down", ".up")):
            assert p.grad is not None and p.grad.abs().max() > 0, f"no gradient reaches {name}"
    assert error(adapted, plain) > 1e-6
    for parent, name, adapter in layers(wrapped, Adapter):
        setattr(parent, name, adapter.merged())
    assert error(run(wrapped), adapted) < 1e-9
    for _, _, layer in layers(module, nn.Linear):
        handle = layer.register_forward_hook(lambda layer, given, y: y * 0)
        changed = run(module)
        handle.remove()
        assert not torch.equal(changed, plain), f"a hook on {layer} is not called"


@causal_subjects
def test_every_layer_of_a_mixer_is_called(subject: Subject):
    module = subject.module()
    if not any(True for _ in layers(module, nn.Linear)):
        pytest.skip("it has no linear layer")

    def run(module: nn.Module) -> Tensor:
        y, state = module(tokens(2, 9), CAUSAL)
        z, _ = module(tokens(2, 1, seed=1), CAUSAL, state)
        return torch.cat([y.flatten(), z.flatten(), *(t.flatten() for t in floating(state))])

    holds(module, run)


@pytest.mark.parametrize(
    "subject", [s for s in subjects("bidirectional") if s.name.endswith("-0")], ids=lambda s: s.name
)
def test_every_layer_of_a_bidirectional_mixer_is_called(subject: Subject):
    holds(subject.module(), lambda module: module(tokens(2, 10), BOTH)[0])


@pytest.mark.parametrize("name", list_ffns())
def test_every_layer_of_a_feed_forward_layer_is_called(name: str):
    for config in FFNS.get(name).examples:
        module = without_zeros(FFNS.get(name).build(48, config, Site()).double())

        def run(module: nn.Module) -> Tensor:
            out = module(tokens(2, 9), Context(Layout()))
            return torch.cat([out.y.flatten(), *(loss.flatten() for loss in out.losses.values())])

        torch.manual_seed(1)
        holds(module, run)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("objective", list_objectives())
def test_the_head_is_called(objective: str, tie: bool):
    for config in get_objective(objective).examples:
        scan = "forward" if objective == "causal" else "bidirectional"
        backbone = BackboneConfig(dim=16, depth=1, pattern=("gla",), scan=scan)
        torch.manual_seed(1)
        model = LanguageModel(
            LanguageModelConfig(backbone=backbone, vocab_size=11, objective=config, tie_word_embeddings=tie)
        ).double()
        ids = torch.arange(18).view(2, 9) % 11

        def run(model: nn.Module, ids: Tensor = ids) -> Tensor:
            torch.manual_seed(2)
            found = model.loss(ids)
            likelihood = model.objective.log_likelihood(model, ids, samples=2).nats
            y = model.hidden(ids, Layout(causal=model.objective.decoder == "autoregressive")).y
            return torch.cat([found.loss.view(1), likelihood, model.logits(y).flatten()])

        plain = run(model)
        hooked = model.head.register_forward_hook(lambda *_: None)
        assert error(run(model), plain) < 1e-9
        hooked.remove()
        adapter = copy.deepcopy(model)
        adapter.head = Adapter(adapter.head)
        adapted = run(adapter)
        assert adapted.shape == plain.shape and error(adapted, plain) > 1e-6
        adapted[0].backward()
        assert adapter.head.up.grad.abs().max() > 0 and adapter.head.down.grad.abs().max() > 0
        if not tie:
            adapter.head = adapter.head.merged()
            assert error(run(adapter), adapted) < 1e-9


@pytest.mark.parametrize("name", list_fronts())
def test_every_layer_of_an_audio_front_is_called(name: str):
    options = FRONTS.get(name).examples[0]
    module = AudioTokenizer(AudioTokenizerConfig(dim=8, front=options)).double()
    if not any(True for _ in layers(module, nn.Linear)):
        pytest.skip("it has no linear layer")
    waves = 0.1 * tokens(2, 1000)[..., 0]
    holds(module, lambda module: module(waves)[0])
