"""Law 8 under torch.compile.

Run by test_law_8.py in a process of its own: torch.compile cannot trace the shape checks that other tests run under.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from omnimix.backbones import Backbone, BackboneConfig, Context, Layout, list_ffns
from omnimix.backbones.config import Site
from omnimix.backbones.ffn import FFNS
from omnimix.backbones.language import LanguageModel, LanguageModelConfig
from omnimix.cli.check_kernels import error
from omnimix.modalities import (
    AudioTokenizer,
    AudioTokenizerConfig,
    TubeletTokenizer,
    TubeletTokenizerConfig,
    list_fronts,
)
from omnimix.modalities.audio.fronts import FRONTS

from .subjects import BOTH, CAUSAL, Subject, floating, subjects, tokens
from .systems import systems

SYSTEMS = systems()


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def mixers(scan: str, index: int) -> pytest.MarkDecorator:
    """One example of each mixer, the last where there are fewer; hybrids are among the systems."""
    chosen = {s.mixer: s for s in subjects(scan) if s.mixer is not None and int(s.name.rpartition("-")[2]) <= index}
    return pytest.mark.parametrize("subject", chosen.values(), ids=lambda s: s.name)


@mixers("forward", 0)
def test_a_mixer_compiles_whole(subject: Subject):
    module = subject.module()
    x = tokens(2, 9)
    with torch.no_grad():
        _, state = module(tokens(2, 3, seed=1), CAUSAL)

    def step(x, state):
        y, after = module(x, CAUSAL, state)
        return y, after

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for before in (None, state):
        plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        # The systems below are differentiated without a state.
        with torch.set_grad_enabled(before is not None):
            (y, after), (z, wanted) = compiled(plain[0], before), step(plain[1], before)
        assert error(y, z) < 1e-12
        assert all(error(a, b) < 1e-12 for a, b in zip(floating(after), floating(wanted), strict=True))
    y.square().sum().backward()
    z.square().sum().backward()
    assert error(plain[0].grad, plain[1].grad) < 1e-12


@mixers("bidirectional", 1)
def test_a_mixer_compiles_whole_both_ways(subject: Subject):
    module = subject.module()
    x = tokens(2, 10)
    compiled = torch.compile(lambda x: module(x, BOTH)[0], fullgraph=True, backend="aot_eager")
    # Gradients are compiled above, and in systems that scan.
    with torch.no_grad():
        assert error(compiled(x), module(x, BOTH)[0]) < 1e-12


@pytest.mark.parametrize("name", ["attention+gla", "linear-0"])
def test_blocks_compile_whole(name: str):
    module = next(s for s in subjects("bidirectional") if s.name == name).module()
    blocks = Layout(causal="block", block=4)
    compiled = torch.compile(lambda x, state: module(x, blocks, state), fullgraph=True, backend="aot_eager")
    before = None
    for x in (tokens(2, 8), tokens(2, 7, seed=1)):
        with torch.set_grad_enabled(before is None):
            (y, state), (wanted, after) = compiled(x, before), module(x, blocks, before)
        assert error(y, wanted) < 1e-12
        assert all(error(a, b) < 1e-12 for a, b in zip(floating(state), floating(after), strict=True))
        before = after


def test_a_language_models_loss_compiles_whole():
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=32, depth=2, pattern=("gla", "attention"))
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11)).double()
    ids = torch.arange(18).view(2, 9) % 11
    compiled = torch.compile(lambda ids: model.loss(ids).loss, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(ids), model.loss(ids).loss
    assert error(found, wanted) < 1e-12
    parameters = tuple(model.parameters())
    for g, w in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert error(g, w) < 1e-12


@pytest.mark.parametrize("name", list_fronts())
def test_an_audio_front_compiles_whole(name: str):
    torch.manual_seed(0)
    options = FRONTS.get(name).examples[0]
    tokenizer = AudioTokenizer(AudioTokenizerConfig(dim=8, front=options)).double()
    waves = 0.1 * tokens(2, 1000)[..., 0]
    compiled = torch.compile(lambda waves: tokenizer(waves)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(waves), tokenizer(waves)[0])


@pytest.mark.parametrize("options", [{"class_token": "middle", "merge": 3}, {"causal": True}], ids=str)
def test_a_video_tokenizer_compiles_whole(options: dict):
    torch.manual_seed(0)
    config = TubeletTokenizerConfig(dim=8, tubelet=(2, 4, 4), size=(4, 8, 8), group=(2, 1, 1), **options)
    tokenizer = TubeletTokenizer(config).double()
    videos = tokens(6, 15 * 9).reshape(2, 3, 15, 9, -1)
    compiled = torch.compile(lambda videos: tokenizer(videos)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(videos), tokenizer(videos)[0])


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.compiles])
def test_a_system_compiles_whole_at_any_length(name: str):
    system = SYSTEMS[name]
    net = system.backbone()

    def function(x, context, state):
        out = net(x, context, state)
        return out.y, out.losses, out.state

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch, time in ((3, 9), (4, 9)) if system.grids else ((2, 9), (2, 7)):
        x = system.tokens(batch, time)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        # A grid has the size that it has; what may change then is the batch.
        torch._dynamo.mark_dynamic(leaves[0], 0 if system.grids else 1)
        contexts = [system.context(leaf) for leaf in leaves]
        for given in torch.utils._pytree.tree_leaves(contexts[0]):
            each_token = isinstance(given, torch.Tensor) and given.shape[1:2] == (time,)
            # A floating-point matrix holds a vector for each sequence, whose width may happen to be the length.
            if each_token and not system.grids and (given.ndim > 2 or not given.is_floating_point()):
                torch._dynamo.mark_dynamic(given, 1)
        found, wanted = compiled(leaves[0], contexts[0], None), function(leaves[1], contexts[1], None)
        equal(found, wanted)
        for result in (found[0], wanted[0]):
            result.square().sum().backward()
        assert error(leaves[0].grad, leaves[1].grad) < 1e-10
    if net.capabilities.causal and net.capabilities.streaming and not system.train and system.layout is None:
        # What nests the states is Python, which is traced as a whole; graphs with states are compiled mixer by mixer.
        x, state = system.tokens(2, 7), wanted[2].detach()
        resumed = torch.compile(function, fullgraph=True, backend="eager")
        with torch.no_grad():
            equal(resumed(x, system.context(x), state), function(x, system.context(x), state))


@pytest.mark.parametrize("name", ["gla", "rglru"])
def test_lengths_share_a_graph(name: str):
    """torch compiles once for the first length, and once more for all others."""
    net = Backbone(BackboneConfig(dim=48, depth=2, pattern=(name,))).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: net(x, CAUSAL).y, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in (20, 33, 50, 90):
            x = tokens(3, length, torch.float32)
            assert error(compiled(x), net(x, CAUSAL).y) < 1e-5
    assert counter.frame_count == 2


def equal(found: tuple, wanted: tuple) -> None:
    """Outputs, losses and states of a compiled backbone and of the plain one."""
    (y, losses, after), (z, truth, state) = found, wanted
    assert error(y, z) < 1e-10
    assert losses.keys() == truth.keys() and all(error(losses[n], truth[n]) < 1e-10 for n in truth)
    assert all(error(a, b) < 1e-10 for a, b in zip(floating(after), floating(state), strict=True))


@pytest.mark.parametrize("name", list_ffns())
def test_a_feed_forward_layer_compiles_whole_and_checkpointed(name: str):
    torch.manual_seed(1)
    for i, config in enumerate(FFNS.get(name).examples):
        module = FFNS.get(name).build(32, config, Site()).double()
        x = torch.randn(2, 7, 32, dtype=torch.float64)

        def plain(x, module=module):
            out = module(x, Context())
            return out.y, out.losses

        def checkpointed(x, plain=plain):
            return checkpoint(plain, x, use_reentrant=False)

        for function in (plain,) if i else (plain, checkpointed):
            torch.compiler.reset()
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            (y, losses), (z, wanted) = compiled(leaves[0]), plain(leaves[1])
            assert error(y, z) < 1e-12 and all(error(losses[n], wanted[n]) < 1e-12 for n in wanted)
            for result in (y, z):
                result.square().sum().backward()
            assert error(leaves[0].grad, leaves[1].grad) < 1e-12
