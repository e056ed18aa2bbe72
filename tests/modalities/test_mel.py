"""Waves to spectrograms."""

from __future__ import annotations

import warnings

import pytest
import torch

from omnimix.errors import ConfigError, UnsupportedCall, UnsupportedShape
from omnimix.modalities import LogMel, MelConfig, SpecAugment, SpecAugmentConfig
from omnimix.modalities.audio.mel import _constants


def waves(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise under a tone that rises, each row louder than the one before."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    time = torch.arange(shape[-1]) / 16_000
    loud = torch.linspace(0.01, 0.5, shape[0])[:, None]
    return (loud * (0.3 * noise + (2000 * (1 + time) * time).sin())).to(dtype)


@pytest.mark.parametrize(("scale", "norm"), [("htk", None), ("htk", "slaney"), ("slaney", None), ("slaney", "slaney")])
@pytest.mark.parametrize("center", [True, False])
def test_spectrograms_are_torchaudio_s(scale, norm, center):
    from torchaudio.transforms import MelSpectrogram

    shape = {"n_fft": 512, "hop_length": 200, "f_min": 40.0, "f_max": 7000.0, "n_mels": 40}
    theirs = MelSpectrogram(16_000, mel_scale=scale, norm=norm, center=center, **shape)
    options = {"window": 512, "hop": 200, "low": 40.0, "high": 7000.0, "bins": 40, "scale": scale, "norm": norm}
    x = waves(2, 3000)
    expected = theirs(x).mT
    found = LogMel(MelConfig(**options, center=center))(x)
    torch.testing.assert_close(found, expected.clamp(min=1e-10).log(), rtol=1e-4, atol=1e-4)
    normalised = LogMel(MelConfig(**options, center=center, log="log10", mean=-3.0, std=2.0))(x)
    torch.testing.assert_close(normalised, (expected.clamp(min=1e-10).log10() + 3) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_s_features(bins):
    from transformers import WhisperFeatureExtractor

    x = waves(2, 16_000)
    x[1, 5000:] *= 1e-4  # quiet enough for the cut below the maximum
    theirs = WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
    expected = theirs(list(x.numpy()), sampling_rate=16_000, return_tensors="pt")["input_features"].mT
    found = LogMel(MelConfig.whisper(bins=bins))(x)
    assert found.shape == (2, 100, bins)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_kaldi_s_features(rate):
    from torchaudio.compliance import kaldi

    x = waves(2, 5000)
    options = {"sample_frequency": float(rate), "num_mel_bins": 64, "window_type": "hanning"}
    expected = torch.stack([kaldi.fbank(row[None], **options) for row in x])
    found = LogMel(MelConfig.kaldi(rate=rate, bins=64, mean=0.0, std=1.0))(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ast_s_features():
    from transformers import ASTFeatureExtractor

    x = waves(1, 8000)
    theirs = ASTFeatureExtractor(max_length=48)(x[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    found = LogMel(MelConfig.kaldi())(x)
    torch.testing.assert_close(found, theirs["input_values"][:, : found.shape[1]], rtol=1e-4, atol=1e-4)


CONFIGS = [MelConfig(), MelConfig(center=False), MelConfig.whisper(), MelConfig.kaldi(), MelConfig.kaldi(rate=8000)]


@pytest.mark.parametrize("config", CONFIGS)
def test_clips_of_any_length(config):
    mel = LogMel(config)
    for samples in (1, 7, 199, 200, 399, 400, 401, 559, 560, 561, 3000):
        x = waves(2, samples)
        out = mel(x)
        assert out.shape == (2, config.frames(samples), config.bins) and out.isfinite().all()
        missing = max(0, config.window - samples)
        assert torch.equal(out, mel(torch.nn.functional.pad(x, (0, missing))))
    assert mel(torch.zeros(1, 1000)).isfinite().all()
    assert mel(torch.zeros(1, 1000, device="meta")).shape == (1, config.frames(1000), config.bins)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_and_dtypes(config):
    mel = LogMel(config)
    x = waves(3, 1500)
    torch.testing.assert_close(mel(x), torch.cat([mel(row[None]) for row in x]))
    torch.testing.assert_close(mel(x.double()).float(), mel(x), rtol=1e-3, atol=1e-3)
    assert mel(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel(x), LogMel(config)(x))
    assert not mel.state_dict() and not list(mel.buffers())


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_the_gradient_is_that_of_the_features(config):
    mel = LogMel(config)
    x = waves(1, 700, dtype=torch.float64).requires_grad_()
    weights = torch.randn(config.frames(700), config.bins, dtype=torch.float64)
    direction, step = torch.randn_like(x), 1e-6

    def loss(x):
        return (mel(x) * weights).sum()

    loss(x).backward()
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_constants_made_under_inference_serve_training():
    mel = LogMel(MelConfig(bins=23))
    with torch.inference_mode(), torch.device("meta"):
        mel(waves(1, 500))
    x = waves(1, 500).requires_grad_()
    mel(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize(
    "config", [MelConfig(), MelConfig.whisper(), MelConfig.kaldi()], ids=["htk", "slaney", "kaldi"]
)
def test_constants_made_under_another_default_dtype_are_the_same(config):
    _constants.cache_clear()
    x = waves(1, 4000)
    right = LogMel(config)(x)
    for dtype in (torch.bfloat16, torch.float64):
        _constants.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            found = LogMel(config)(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, right) and torch.equal(LogMel(config)(x), right)


def test_filters_without_a_frequency_are_told_of():
    _constants.cache_clear()
    with pytest.warns(UserWarning, match="of 80 filters hold no frequency"):
        LogMel(MelConfig(bins=80, window=128, hop=64))(waves(1, 500))


def test_usual_configurations_have_no_empty_filters():
    _constants.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (MelConfig(), MelConfig(scale="slaney"), MelConfig.whisper(), MelConfig.whisper(bins=128)):
            assert LogMel(config)(waves(1, 500)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "words"), [(torch.zeros(1, 0), r"\(1, 0\)"), (torch.zeros(1, 9, dtype=torch.int16), "int16")]
)
def test_waves_that_cannot_be_served(without_shape_checks, x, words):
    with pytest.raises(UnsupportedShape, match=words):
        LogMel(MelConfig())(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"bins": 0}, "bins"),
        ({"window": 1}, "window"),
        ({"hop": 500}, "hop is 500"),
        ({"low": 9000.0}, "low is 9000"),
        ({"high": 9000.0}, "high 9000"),
        ({"scale": "bark"}, "bark"),
        ({"log": "db"}, "db"),
        ({"norm": "area"}, "area"),
        ({"std": 0.0}, "std"),
        ({"scale": "kaldi"}, "MelConfig.kaldi"),
        ({"log": "whisper", "center": False}, "center=True"),
    ],
)
def test_spectrograms_that_cannot_be(without_shape_checks, options, words):
    with pytest.raises(ConfigError, match=words):
        MelConfig(**options)


# Masks


def masked(seed: int = 0, rows: int = 64, frames: int = 50, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    layer = SpecAugment(SpecAugmentConfig(**options))
    return layer(torch.ones(rows, frames, 20)) == 0


def test_masks_are_stretches_of_the_given_widths():
    time = masked(time_masks=1, time_width=9)
    assert torch.equal(time.any(2), time.all(2))  # whole frames
    widths = time.all(2).sum(1)
    assert widths.max() == 9 and widths.min() < 3 and len(widths.unique()) > 5
    edges = time.all(2).int().diff(dim=1, prepend=torch.zeros(64, 1), append=torch.zeros(64, 1)).abs().sum(1)
    assert edges.max() == 2  # one stretch
    bands = masked(frequency_masks=1, frequency_width=4)
    assert torch.equal(bands.any(1), bands.all(1)) and bands.all(1).sum(1).max() == 4
    assert len({tuple(row.tolist()) for row in time.all(2)}) > 30  # each clip its own
    both = masked(time_masks=2, frequency_masks=2)
    assert both.any(2).all(1).any() or (both.any((1, 2))).float().mean() > 0.9


def test_a_mask_is_a_part_of_the_clip():
    widths = masked(time_masks=1, time_width=40, time_share=0.25, frames=20).all(2).sum(1)
    assert widths.max() == 5
    assert not masked(time_masks=1, time_share=0.25, frames=3).any()
    assert not masked(frequency_masks=1, frequency_width=100).all(2).all()


def test_masks_follow_the_seed_and_training_alone():
    options = {"time_masks": 1, "frequency_masks": 1}
    assert torch.equal(masked(3, **options), masked(3, **options))
    assert not torch.equal(masked(3, **options), masked(4, **options))
    layer, x = SpecAugment(SpecAugmentConfig(**options)).eval(), torch.ones(2, 9, 8)
    assert layer(x) is x
    assert layer.train()(x) is not x and x.all()
    assert SpecAugment(SpecAugmentConfig())(x) is x


@pytest.mark.parametrize("options", [{"time_masks": -1}, {"time_width": 0}, {"time_share": 0.0}, {"time_share": 1.5}])
def test_masks_that_cannot_be(without_shape_checks, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SpecAugmentConfig(**options)


@pytest.mark.parametrize(
    "config", [MelConfig.whisper(rate=22_050), MelConfig(window=401), MelConfig(), MelConfig.kaldi()]
)
def test_as_many_frames_as_said(config):
    for samples in (2_000, 2_200, 2_201, 4_800):
        assert LogMel(config)(torch.zeros(1, samples)).shape[1] == config.frames(samples)


def test_only_frames_of_their_own_samples_are_streamed():
    with pytest.raises(UnsupportedCall, match="center"):
        LogMel(MelConfig()).stream(torch.zeros(1, 800))
