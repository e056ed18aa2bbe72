"""Waves to tokens, and what the head makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimix.backbones import Layout
from omnimix.backbones.heads import ClassificationHead, ClassificationHeadConfig
from omnimix.errors import ConfigError, UnknownName, UnsupportedCall, UnsupportedShape
from omnimix.modalities import (
    AudioTokenizer,
    AudioTokenizerConfig,
    FrameFrontConfig,
    MelConfig,
    PatchFrontConfig,
    SpecAugmentConfig,
    WaveFrontConfig,
    list_fronts,
)
from omnimix.modalities.audio.convolution import sinusoids
from omnimix.modalities.audio.fronts import FRONTS

EXAMPLES = [(name, config) for name in list_fronts() for config in FRONTS.get(name).examples]
every_example = pytest.mark.parametrize(
    ("name", "config"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)]
)
LENGTHS = (3000, 1700, 90, 3000, 5000)


def waves(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(*lengths: int) -> list[torch.Tensor]:
    return [waves(n, seed=i) for i, n in enumerate(lengths)]


def tokenizer(config, *, causal: bool = False, dim: int = 8) -> AudioTokenizer:
    torch.manual_seed(0)
    return AudioTokenizer(AudioTokenizerConfig(dim=dim, front=config, causal=causal)).double()


# Fronts


@every_example
def test_clips_of_one_length_stand_on_a_grid(name, config):
    net = tokenizer(config)
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
    net, alone = tokenizer(config), tokenizer(config)
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
    net = tokenizer(config)
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
    net = tokenizer(config)
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
    net = tokenizer(FrameFrontConfig(mel=MelConfig.whisper(bins=16)), dim=12)
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
    net = tokenizer(config)
    x = waves(1, 16_000)
    tokens, _ = net(x)
    assert tokens.shape == (1, 49, 8)
    changed = x.clone()
    changed[:, 320 * 20 : 320 * 20 + 400] += waves(1, 400, seed=3)
    assert (net(changed)[0] != tokens).any(-1)[0].nonzero()[:, 0].tolist() == [19, 20, 21]
    single = WaveFrontConfig(kernels=(400,), strides=(320,), positions="none")
    net = tokenizer(single)
    layer = net.front.convolutions[0]
    heard = F.conv1d(x[:, None], layer.weight, layer.bias, stride=320).mT
    expected = F.gelu(heard / (heard.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(net(x)[0], net.front.proj(expected))


def test_waves_keep_their_precision():
    """A quiet sound on a large offset is lost where samples have eight bits."""
    config = WaveFrontConfig(kernels=(400,), strides=(320,), positions="none")
    net = tokenizer(config).float()
    layer, x = net.front.convolutions[0], 100 + waves(1, 2000).float()
    with torch.no_grad():  # the offset cancels
        layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat_interleave(200).expand_as(layer.weight))
    exact = layer(x[..., None])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x[..., None]), exact)
    torch.testing.assert_close(layer.bfloat16()(x[..., None]), exact)
    assert net(x)[0].isfinite().all()


def test_masks_are_for_training():
    masks = SpecAugmentConfig(time_masks=2, time_width=10)
    for kind in (PatchFrontConfig, FrameFrontConfig):
        net, x = tokenizer(kind(augment=masks)), waves(2, 8000)
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
        tokenizer(WaveFrontConfig(channels=2))(x)


def test_configurations_that_cannot_be(without_shape_checks):
    with pytest.raises(UnknownName, match="patches"):
        AudioTokenizerConfig(dim=8, front="patchs")
    with pytest.raises(ConfigError, match="front is None; it must be the options of an audio front or a name"):
        AudioTokenizerConfig(dim=8, front=None)
    with pytest.raises(ConfigError, match="front is MelConfig.*; it must be the options of an audio front or a name"):
        AudioTokenizerConfig(dim=8, front=MelConfig())
    with pytest.raises(ConfigError, match="use 'frames' or 'wave'"):
        tokenizer(PatchFrontConfig(), causal=True)
    with pytest.raises(ConfigError, match="center"):
        tokenizer(FrameFrontConfig(), causal=True)
    for wrong in ({"strides": (5,)}, {"kernels": (), "strides": ()}, {"kernels": (2,), "strides": (3,)}):
        with pytest.raises(ConfigError, match="kernels"):
            WaveFrontConfig(**wrong)
    for kind in (WaveFrontConfig, FrameFrontConfig, PatchFrontConfig):
        with pytest.raises(ConfigError, match="rotary"):
            kind(positions="rotary")


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
