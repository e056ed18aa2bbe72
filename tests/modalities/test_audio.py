"""Waves to tokens, and models that begin there."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from omnimix.backbones import BackboneConfig, Layout, from_dict, list_mixers, to_dict
from omnimix.backbones.heads import ClassificationHead, ClassificationHeadConfig
from omnimix.errors import ConfigError, UnknownName, UnsupportedCall, UnsupportedShape
from omnimix.modalities import (
    AudioClassifier,
    AudioClassifierConfig,
    AudioTokenizer,
    AudioTokenizerConfig,
    FrameFrontConfig,
    MelConfig,
    PatchFrontConfig,
    SpecAugmentConfig,
    WaveFrontConfig,
    audio_classifier,
    build_model,
    create_model,
    list_fronts,
    list_models,
    load_model,
    model_config,
    save_model,
)
from omnimix.modalities.audio_models import AUDIO_MODELS
from omnimix.modalities.fronts import FRONTS, sinusoids

EXAMPLES = [(name, config) for name in list_fronts() for config in FRONTS.get(name).examples]
every_example = pytest.mark.parametrize(
    ("name", "config"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)]
)
LENGTHS = (3000, 1700, 90, 3000, 5000)
# Short enough to be quick, long enough for every part of every mixer.
SMALL = {"classes": 3, "dim": 16, "depth": 2, "bins": 16, "patch": 4, "seconds": 0.5, "rate": 8000}


def waves(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(*lengths: int) -> list[torch.Tensor]:
    return [waves(n, seed=i) for i, n in enumerate(lengths)]


def tokenizer(name: str, config, *, causal: bool = False, dim: int = 8) -> AudioTokenizer:
    torch.manual_seed(0)
    return AudioTokenizer(AudioTokenizerConfig(dim=dim, front=name, fronts={name: config}, causal=causal)).double()


def small(mixer: str = "gla", **options) -> AudioClassifier:
    torch.manual_seed(0)
    return create_model(f"ast_tiny_{mixer}", **SMALL | options)


# Fronts


@every_example
def test_clips_of_one_length_stand_on_a_grid(name, config):
    net = tokenizer(name, config)
    for samples in (1, 400, 3000, 3001):
        tokens, layout = net(waves(2, samples))
        layout.check(tokens)
        assert layout.grid is not None and layout.cu_seqlens is None and layout.causal is False
        assert tokens.isfinite().all()
        torch.testing.assert_close(tokens, torch.cat([net(row[None])[0] for row in waves(2, samples)]))
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@every_example
def test_law_3_packed_clips_are_those_alone(name, config):
    net, alone = tokenizer(name, config), tokenizer(name, config)
    packed, single = ([c.requires_grad_() for c in clips(*LENGTHS)] for _ in range(2))
    tokens, layout = net(packed)
    rows = [alone(clip[None]) for clip in single]
    assert tokens.shape[0] == 1 and layout.cu_seqlens.diff().tolist() == [row.shape[1] for row, _ in rows]
    assert layout.grid is None and layout.causal is False
    expected = torch.cat([row for row, _ in rows], dim=1)
    torch.testing.assert_close(tokens, expected)
    beside = [start + at for start, (_, own) in zip(layout.cu_seqlens.tolist(), rows, strict=False) for at in own.extra]
    assert list(layout.extra) == beside
    weights = torch.randn_like(expected)
    (tokens * weights).sum().backward()
    (expected * weights).sum().backward()
    for p, q in zip([*net.parameters(), *packed], [*alone.parameters(), *single], strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(clip.grad.any() for clip in packed)


def test_patches_stand_time_by_time():
    config = PatchFrontConfig(mel=MelConfig.kaldi(bins=16), patch=(4, 8), frames=24, positions="none")
    net = tokenizer("patches", config)
    x = waves(1, 400 + 23 * 160)  # 24 frames
    mel = net.front.mel(x)
    expected = F.conv2d(mel[:, None], net.front.patches.proj.weight, net.front.patches.proj.bias, stride=(4, 8))
    tokens, layout = net(x)
    assert layout.grid == (1, 6, 2)
    torch.testing.assert_close(tokens, expected.flatten(2).mT)
    late = x.clone()
    late[:, 3000:] += 1  # heard from frame 17 on
    changed = (net(late)[0] != tokens).any(-1)[0].nonzero()[:, 0]
    assert changed.min() == 2 * (17 // 4)


def test_positions_of_patches_are_of_times_and_of_bands():
    config = PatchFrontConfig(mel=MelConfig.kaldi(bins=16), patch=4, frames=24)
    net = tokenizer("patches", config)
    shapes = {n: p.shape for n, p in net.named_parameters() if "positions" in n}
    assert sorted(shapes.values()) == [(4, 8), (6, 8)]
    assert len({n for n, p in net.named_parameters() if "positions" in n}) == 2
    torch.nn.init.zeros_(net.front.patches.proj.weight)
    tokens, _ = net(waves(1, 400 + 23 * 160))
    table = tokens.view(6, 4, 8)
    torch.testing.assert_close(table[1:] - table[:-1], (table[1:, :1] - table[:-1, :1]).expand(5, 4, 8))
    longer, layout = net(waves(1, 400 + 47 * 160))
    assert layout.grid == (1, 12, 4)  # interpolated: bands as before, times in between
    bands = longer.view(12, 4, 8) - longer.view(12, 4, 8)[:, :1]
    torch.testing.assert_close(bands, (table[:1] - table[:1, :1]).expand(12, 4, 8))


def test_frames_are_whisper_s():
    net = tokenizer("frames", FrameFrontConfig(mel=MelConfig.whisper(bins=16)), dim=12)
    x = waves(2, 16_000)
    tokens, layout = net(x)
    assert layout.grid == (50, 1, 1)
    expected = net.front.mel(x).mT
    for layer, stride in ((net.front.first, 1), (net.front.second, 2)):
        expected = F.gelu(F.conv1d(expected, layer.weight, layer.bias, stride=stride, padding=1))
    # Section 2.2 and its code: sin and cos of t / 10000^(i / (d / 2 - 1)).
    angles = torch.arange(50.0)[:, None] / 10_000 ** (torch.arange(6) / 5)
    torch.testing.assert_close(
        tokens, expected.mT + torch.cat([angles.sin(), angles.cos()], dim=1), rtol=1e-5, atol=1e-5
    )


def test_sinusoids_go_on():
    device = torch.device("cpu")
    torch.testing.assert_close(sinusoids(5, 8, start=3, device=device), sinusoids(8, 8, device=device)[3:])
    assert sinusoids(4, 7, device=device).shape == (4, 7) and sinusoids(4, 1, device=device).shape == (4, 1)


def test_waves_are_heard_as_wav2vec_hears_them():
    config = WaveFrontConfig(channels=4)
    assert config.field == 400
    net = tokenizer("wave", config)
    x = waves(1, 16_000)
    tokens, _ = net(x)
    assert tokens.shape == (1, 49, 8)
    changed = x.clone()
    changed[:, 320 * 20 : 320 * 20 + 400] += waves(1, 400, seed=3)
    assert (net(changed)[0] != tokens).any(-1)[0].nonzero()[:, 0].tolist() == [19, 20, 21]
    single = WaveFrontConfig(kernels=(400,), strides=(320,), positions="none")
    net = tokenizer("wave", single)
    layer = net.front.convolutions[0]
    heard = F.conv1d(x[:, None], layer.weight, layer.bias, stride=320).mT
    expected = F.gelu(heard / (heard.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(net(x)[0], net.front.proj(expected))


def test_masks_are_for_training():
    masks = SpecAugmentConfig(time_masks=2, time_width=10)
    for name, kind in (("patches", PatchFrontConfig), ("frames", FrameFrontConfig)):
        net, x = tokenizer(name, kind(augment=masks)), waves(2, 8000)
        torch.manual_seed(1)
        first = net(x)[0]
        assert not torch.equal(first, net(x)[0])
        torch.manual_seed(1)
        assert torch.equal(first, net(x)[0])
        net.eval()
        assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([], "empty list"),
        ([torch.zeros(5), torch.zeros(0)], r"\(0,\)"),
        ([torch.zeros(1, 5)], r"must be \(samples,\)"),
        (torch.zeros(2, 1, 5), r"must be \(clips, samples\)"),
        (torch.zeros(2, 0), r"\(2, 0\)"),
        (torch.zeros(0, 5), r"\(0, 5\)"),
        (torch.zeros(2, 5, dtype=torch.int16), "int16"),
    ],
)
def test_waves_that_cannot_be_served(without_shape_checks, x, words):
    with pytest.raises(UnsupportedShape, match=words):
        tokenizer("wave", WaveFrontConfig(channels=2))(x)


def test_configurations_that_cannot_be(without_shape_checks):
    with pytest.raises(UnknownName, match="patches"):
        AudioTokenizerConfig(dim=8, front="patchs")
    with pytest.raises(ConfigError, match=r"fronts\['wave'\] is a FrameFrontConfig"):
        AudioTokenizerConfig(dim=8, fronts={"wave": FrameFrontConfig()})
    with pytest.raises(ConfigError, match="use 'frames' or 'wave'"):
        tokenizer("patches", PatchFrontConfig(), causal=True)
    with pytest.raises(ConfigError, match="center"):
        tokenizer("frames", FrameFrontConfig(), causal=True)
    for wrong in ({"strides": (5,)}, {"kernels": (), "strides": ()}, {"kernels": (2,), "strides": (3,)}):
        with pytest.raises(ConfigError, match="kernels"):
            WaveFrontConfig(**wrong)
    for kind in (WaveFrontConfig, FrameFrontConfig, PatchFrontConfig):
        with pytest.raises(ConfigError, match="rotary"):
            kind(positions="rotary")
    with pytest.raises(ConfigError, match="class_token"):
        audio_classifier(mixer="gla", dim=8, depth=1, front="wave", class_token="middle")
    with pytest.raises(ConfigError, match="masks spectrograms"):
        audio_classifier(mixer="gla", dim=8, depth=1, front="wave", augment=SpecAugmentConfig())
    with pytest.raises(ConfigError, match="the audio front has none"):
        audio_classifier(mixer="gla", dim=8, depth=1, pool="class_token")
    with pytest.raises(ConfigError, match="seconds is 0"):
        audio_classifier(mixer="gla", dim=8, depth=1, seconds=0)
    parts = {"backbone": BackboneConfig(dim=16, depth=1), "head": ClassificationHeadConfig()}
    with pytest.raises(ConfigError, match="audio.dim is 8"):
        AudioClassifierConfig(audio=AudioTokenizerConfig(dim=8), **parts)
    both = BackboneConfig(dim=8, depth=1, scan="both")
    with pytest.raises(ConfigError, match="scans 'forward'"):
        AudioClassifierConfig(
            audio=AudioTokenizerConfig(dim=8, front="wave", causal=True), **parts | {"backbone": both}
        )


# The head over packed sequences


@pytest.mark.parametrize("pool", ["mean", "max", "class_token", "none"])
def test_law_3_the_head_pools_each_packed_sequence(pool):
    head = ClassificationHead(8, ClassificationHeadConfig(classes=5, pool=pool)).double()
    tokens = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    layout = Layout(causal=False, cu_seqlens=torch.tensor([0, 5, 7, 12]), extra=(2, 4, 5, 9, 11))
    parts = [(0, 5, (2, 4)), (5, 7, (0,)), (7, 12, (2, 4))]
    alone = [
        head(tokens[:, a:b], Layout(causal=False, grid=(b - a - len(extra), 1, 1), extra=extra))
        for a, b, extra in parts
    ]
    found = head(tokens, layout)
    torch.testing.assert_close(found, torch.cat(alone, dim=1 if pool == "none" else 0))
    if pool == "none":
        return
    weights = torch.randn(3, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), tokens)
    (expected,) = torch.autograd.grad((torch.cat(alone) * weights).sum(), tokens)
    torch.testing.assert_close(gradient, expected)
    (gradient,) = torch.autograd.grad(head(tokens, layout)[1].sum(), tokens)
    assert gradient[:, 5:7].any() and not gradient[:, :5].any() and not gradient[:, 7:].any()


def test_a_sequence_without_a_class_token_is_refused():
    head = ClassificationHead(8, ClassificationHeadConfig(pool="class_token"))
    with pytest.raises(UnsupportedCall, match="class token"):
        head(torch.zeros(1, 6, 8), Layout(causal=False, cu_seqlens=torch.tensor([0, 3, 6]), extra=(1,)))


# Models


def test_published_sizes():
    published = {"aum_tiny": 7e6, "aum_small": 26e6, "aum_base": 92.1e6}
    for name, size in published.items():
        with torch.device("meta"):
            model = create_model(name)
        parameters = {n: p.numel() for n, p in model.named_parameters()}
        total = sum(parameters.values())
        if name == "aum_base":
            # The published one is "Fo-Bi", whose directions share all but A; ours, as in Vision Mamba, own the rest.
            total -= sum(size for n, size in parameters.items() if ".branches.1." in n and "A_log" not in n)
            assert abs(total / size - 1) < 0.001
        assert abs(total / size - 1) < 0.05, f"{name} has {total}"


def test_audio_mamba():
    config = model_config("aum_base")
    assert (config.backbone.depth, config.backbone.dim, config.backbone.channel) == (24, 768, None)
    assert config.backbone.scan == "both" and config.head.classes == 527
    options = config.audio.options
    assert options.grid(768).grid() == (64, 8) and options.class_token == "middle"
    with torch.device("meta"):
        model = create_model("aum_tiny", depth=1)
        tokens, layout = model.forward_features(torch.zeros(1, 400 + 1023 * 160))
    assert tokens.shape == (1, 513, 192) and layout.extra == (256,)


def test_there_is_a_model_for_every_mixer():
    assert {f"ast_tiny_{mixer}" for mixer in list_mixers()} <= set(list_models())


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_classifies_sounds_of_any_length(mixer, without_gradient):
    model = small(mixer).double()
    lengths = (4000, 100, 2500)
    packed = model.eval()(clips(*lengths))
    assert packed.shape == (3, 3) and packed.isfinite().all()
    torch.testing.assert_close(packed, torch.cat([model(clip[None]) for clip in clips(*lengths)]))
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert not without_gradient(model.train(), lambda model: (model(waves(2, 4400)) * weights).sum())


@pytest.mark.parametrize("front", list_fronts())
def test_the_first_token_hears_the_end(front):
    model = small("mamba", front=front, positions="none").double().eval()
    x = waves(2, 4000).requires_grad_()
    model.forward_features(x)[0][0, 0].sum().backward()
    assert x.grad[0, -400:].abs().max() > 0 and x.grad[1].abs().max() == 0


def test_overrides():
    config = model_config("ast_tiny_attention", classes=5, rate=8000, seconds=2.0, bins=64, patch=(8, 16), dropout=0.1)
    options = config.audio.options
    assert (options.mel.rate, options.mel.hop, options.mel.bins, options.frames) == (8000, 80, 64, 200)
    assert options.patch == (8, 16) and config.audio.rate == 8000 and config.head.classes == 5
    assert not config.backbone.mixers["attention"].rope
    assert model_config("ast_tiny_attention", positions="none").backbone.mixers == {}
    assert model_config("ast_tiny_gla", front="wave", rate=8000).audio.rate == 8000
    own = WaveFrontConfig(channels=3)
    assert model_config("ast_tiny_gla", front="wave", fronts={"wave": own}).audio.options is own
    masks = SpecAugmentConfig(time_masks=1)
    assert model_config("ast_tiny_gla", front="frames", augment=masks).audio.options.augment == masks
    assert model_config("aum_tiny", mixer="gla,attention").backbone.pattern == ("gla", "attention")


@pytest.mark.parametrize("name", sorted(AUDIO_MODELS))
def test_configurations_survive_json(name):
    for front in ("patches",) if name.startswith("aum") else list_fronts():
        config = model_config(name, classes=5, front=front)
        assert from_dict(AudioClassifierConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("front", list_fronts())
def test_a_saved_model_hears_clips_of_another_length(tmp_path, front):
    model = small(front=front).eval()
    save_model(model, tmp_path, details={"classes": ["a", "b", "c"]})
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for x in (waves(2, 4000).float(), waves(2, 9000).float(), [c.float() for c in clips(300, 9000)]):
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ConfigError, match="AudioClassifier has none"):
        load_model(tmp_path, size=32)


def test_low_precision():
    model, x = small(classes=5).eval(), waves(2, 4000).float()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x).float(), exact, rtol=0.05, atol=0.05)


# Streams

CAUSAL = {"frames": {}, "wave": {"fronts": {"wave": WaveFrontConfig(rate=8000, channels=4)}}}


def streamed(model: AudioClassifier, x: torch.Tensor, sizes: list[int]):
    state, now = None, []
    for chunk in x.split(sizes, dim=1):
        step = model.stream(chunk, state)
        state = step.state
        now.append(step.now)
    step = model.finish(state)
    return torch.cat([*now, step.now], dim=1), step.so_far, step.state


@pytest.mark.parametrize(("front", "mixer"), [("frames", "gla,window"), ("wave", "mamba"), ("wave", "attention")])
def test_law_2_chunk_by_chunk_is_the_whole(front, mixer):
    torch.manual_seed(0)
    options = {"classes": 3, "dim": 16, "depth": 2, "bins": 16, "rate": 8000}
    model = create_model("ast_tiny_gla", mixer=mixer, front=front, causal=True, **options | CAUSAL[front])
    model = model.double().eval()
    for samples, sizes in ((2500, [1, 0, 7, 300, 92, 81, 2019]), (90, [40, 50]), (2000, [100] * 20)):
        x = waves(2, samples).requires_grad_()
        tokens, layout = model.forward_features(x)
        assert layout.causal is True
        now, so_far, state = streamed(model, x, sizes)
        torch.testing.assert_close(now, model.head.classifier(tokens))
        torch.testing.assert_close(so_far, model(x))
        assert state.front.steps == tokens.shape[1]
        (gradient,) = torch.autograd.grad(so_far.square().sum(), x)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_a_stream_is_causal_and_its_memory_constant():
    model = small(front="frames", causal=True).double().eval()
    x = waves(1, 3000)
    early, _, _ = streamed(model, x[:, :1500], [1500])
    now, _, state = streamed(model, x, [1500, 1500])
    torch.testing.assert_close(now[:, : early.shape[1]], early)
    _, _, longer = streamed(model, waves(1, 12_000), [1000] * 12)
    assert abs(longer.nbytes - state.nbytes) <= model.config.audio.options.mel.window * 8
    kept = longer.detach()
    assert kept.nbytes == longer.nbytes and not kept.total.requires_grad


def test_streams_that_cannot_be(without_shape_checks):
    with pytest.raises(UnsupportedCall, match="causal=True"):
        small().stream(waves(1, 100))
    with pytest.raises(UnsupportedCall, match="'max'"):
        small(front="wave", causal=True, pool="max").stream(waves(1, 100))
    with pytest.raises(UnsupportedCall, match="hears whole clips"):
        small().tokenizer.stream(waves(1, 100))
    model = small(front="frames", causal=True).double()
    state = model.stream(waves(2, 500)).state
    with pytest.raises(UnsupportedShape, match="1 rows, and the state 2"):
        model.stream(waves(1, 100), state)
    with pytest.raises(UnsupportedShape, match="samples"):
        model.stream(waves(100), state)
    with pytest.raises(UnsupportedShape, match="int64"):
        model.stream(torch.zeros(2, 5, dtype=torch.int64), state)
    assert model.stream(waves(2, 0), state).now.shape == (2, 0, 3)


def test_models_are_built_from_their_configurations():
    config = audio_classifier(mixer="linear", dim=8, depth=1, front="wave", causal=True)
    assert isinstance(build_model(config), AudioClassifier) and build_model(config).config == config
