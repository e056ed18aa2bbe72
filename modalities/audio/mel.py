"""Log-mel spectrograms, as torchaudio, Whisper and Kaldi compute them, and the masks of SpecAugment."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import bounded, not_negative, positive, proportion
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ...utils.modes import constant_in_graphs, outliving_modes, own_precision

SCALES = ("htk", "slaney", "kaldi")
LOGS = ("natural", "log10", "whisper")
FLOOR = 1e-10  # of energies before their logarithm, as Whisper has it
# AST (arXiv 2104.01778) divides by twice the deviation of AudioSet's features.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 2 * 4.5689974


# The most samples a second, and the most of what is counted in samples.
FASTEST = 1 << 24
# The most numbers in the filters of a spectrogram.
LARGEST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class MelConfig(Config):
    """How a wave becomes a log-mel spectrogram; `MelConfig.whisper()` and `MelConfig.kaldi()` are the usual ones.

    Args:
        rate: samples a second of the waves.
        bins: mel filters.
        window: samples of the (Hann) window; also of the Fourier transform, for Kaldi's its next power of two.
        hop: samples between two frames.
        low, high: the range of the filters in Hz; `high` is half the rate by default.
        scale: the mel scale, "htk" or "slaney"; or "kaldi", HTK's with everything else as Kaldi's fbank has it: frames
            that lie wholly in the clip, each without its mean and with a preemphasis of 0.97, a symmetric window.
        norm: "slaney" makes the filters' areas equal; None leaves their heights so.
        log: "natural", "log10", or "whisper": log10, cut off at 8 below the clip's maximum, (x + 4) / 4, and no last
            frame.
        center: whether the first frame is centred on the first sample (the clip mirrored at its ends) or begins with
            it.
        mean, std: what is subtracted from the logarithms, and what divides them then.
    """

    rate: int = 16_000
    bins: int = 64
    window: int = 400
    hop: int = 160
    low: float = 0.0
    high: float | None = None
    scale: Literal["htk", "slaney", "kaldi"] = "htk"
    norm: Literal["slaney"] | None = None
    log: Literal["natural", "log10", "whisper"] = "natural"
    center: bool = True
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "rate", "hop", "window", "std", most=FASTEST)
        positive(self, "bins", most=4096)
        if self.window * self.bins > LARGEST:
            raise ConfigError(
                f"MelConfig.window is {self.window} and bins {self.bins}; their product must be at most {LARGEST:,}"
            )
        bounded(self, "mean", least=-FASTEST, most=FASTEST)
        bounded(self, "window", least=2, wanted="at least 2 samples")
        if self.hop > self.window:
            raise ConfigError(f"MelConfig.hop is {self.hop}; it must be at most the window, {self.window} samples")
        top = self.rate / 2 if self.high is None else self.high
        if not 0 <= self.low < top <= self.rate / 2:
            raise ConfigError(
                f"MelConfig.low is {self.low} and high {self.high}; 0 <= low < high <= {self.rate / 2} must hold"
            )
        for name, value, known in (("scale", self.scale, SCALES), ("log", self.log, LOGS)):
            if value not in known:
                raise ConfigError(f"MelConfig.{name} is {value!r}; it must be one of {', '.join(known)}")
        if self.norm not in (None, "slaney"):
            raise ConfigError(f"MelConfig.norm is {self.norm!r}; it must be 'slaney' or None")
        if self.scale == "kaldi" and (self.norm is not None or self.log != "natural" or self.center or self.bins < 4):
            raise ConfigError(
                "MelConfig.scale is 'kaldi', which has norm=None, log='natural', center=False and at least 4 bins; "
                "MelConfig.kaldi() sets them"
            )
        if self.log == "whisper" and not self.center:
            raise ConfigError("MelConfig.log is 'whisper', which has center=True")

    @staticmethod
    def whisper(*, rate: int = 16_000, bins: int = 80) -> MelConfig:
        """What Whisper (arXiv 2212.04356, section 2.2) is given; 128 bins from its third large model on."""
        return MelConfig(
            rate=rate,
            bins=bins,
            window=rate // 40,
            hop=rate // 100,
            scale="slaney",
            norm="slaney",
            log="whisper",
        )

    @staticmethod
    def kaldi(
        *, rate: int = 16_000, bins: int = 128, mean: float = AUDIOSET_MEAN, std: float = AUDIOSET_STD
    ) -> MelConfig:
        """What AST (arXiv 2104.01778) and Audio Mamba (arXiv 2406.03344) are given, by default as on AudioSet."""
        return MelConfig(
            rate=rate,
            bins=bins,
            window=rate // 40,
            hop=rate // 100,
            low=20.0,
            scale="kaldi",
            center=False,
            mean=mean,
            std=std,
        )

    def at_rate(self, rate: int) -> MelConfig:
        """The same windows and hops in seconds, for waves of another rate."""
        window, hop = self.window * rate // self.rate, round(self.hop * rate / self.rate)
        return replace(self, rate=rate, window=window, hop=max(1, hop))

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples."""
        samples = max(samples, self.window)
        if not self.center:
            return 1 + (samples - self.window) // self.hop
        return (samples - self.window % 2) // self.hop + (self.log != "whisper")


@constant_in_graphs
def constants(config: MelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The window, and the filters `(frequencies, bins)`.

    Kept by configuration instead of as buffers: nothing to save, to move, or to fill in after a construction on the
    meta device.
    """
    return _constants(config, device, dtype)


@lru_cache(maxsize=64)
def _constants(config: MelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Made in float64, whatever torch's default dtype is when they are first asked for.
    with outliving_modes():
        filters = _filters(config)
        if empty := int((filters.amax(0) == 0).sum()):
            warnings.warn(
                f"MelConfig: {empty} of {config.bins} filters hold no frequency of {config.window} samples; use fewer "
                "bins, or a longer window",
                stacklevel=2,
            )
        periodic = config.scale != "kaldi"
        window = torch.hann_window(config.window, periodic=periodic, dtype=torch.float64)
        return window.to(device, dtype), filters.to(device, dtype)


def _filters(config: MelConfig) -> Float[Tensor, "frequencies bins"]:
    """Triangles whose corners are evenly spaced in mel; Kaldi's sides are straight in mel, the others' in Hz."""
    top = config.rate / 2 if config.high is None else config.high
    size = _fft_size(config)
    hertz = torch.linspace(0, config.rate // 2, size // 2 + 1, dtype=torch.float64)
    low, high = _mel(torch.tensor([config.low, top], dtype=torch.float64), config.scale).tolist()
    corners = torch.linspace(low, high, config.bins + 2, dtype=torch.float64)
    if config.scale == "kaldi":
        # It has no filter at half the rate.
        hertz = torch.arange(size // 2 + 1, dtype=torch.float64) * (config.rate / size)
        filters = _triangles(_mel(hertz, "kaldi"), corners)
        filters[-1] = 0
        return filters
    corners = _hertz(corners, config.scale)
    filters = _triangles(hertz, corners)
    return filters * (2 / (corners[2:] - corners[:-2])) if config.norm == "slaney" else filters


def _triangles(at: Tensor, corners: Tensor) -> Tensor:
    """For each three neighbouring corners a function that rises from 0 to 1 and falls to 0 again, at `at`."""
    widths = corners.diff()
    rise = (at[:, None] - corners[:-2]) / widths[:-1]
    fall = (corners[2:] - at[:, None]) / widths[1:]
    return torch.minimum(rise, fall).clamp(min=0)


# Slaney's scale (Auditory Toolbox) is linear up to 1000 Hz, its mel 15, and has 27 mel for a factor of 6.4 from there.
KNEE, MELS_BELOW, SLOPE = 1000.0, 15.0, math.log(6.4) / 27


def _mel(hertz: Tensor, scale: str) -> Tensor:
    if scale != "slaney":
        # HTK's; Kaldi's 1127 ln is the same.
        return 2595 * torch.log10(1 + hertz / 700)
    above = MELS_BELOW + torch.log(hertz.clamp(min=KNEE) / KNEE) / SLOPE
    return torch.where(hertz < KNEE, hertz * (MELS_BELOW / KNEE), above)


def _hertz(mel: Tensor, scale: str) -> Tensor:
    if scale != "slaney":
        return 700 * (10 ** (mel / 2595) - 1)
    above = KNEE * torch.exp(SLOPE * (mel - MELS_BELOW).clamp(min=0))
    return torch.where(mel < MELS_BELOW, mel * (KNEE / MELS_BELOW), above)


def _fft_size(config: MelConfig) -> int:
    return 2 ** math.ceil(math.log2(config.window)) if config.scale == "kaldi" else config.window


class LogMel(nn.Module):
    """Waves to log-mel spectrograms, in float32 (float64 where the waves are), differentiable.

    A clip shorter than a window is padded with silence at its end.
    """

    def __init__(self, config: MelConfig):
        super().__init__()
        self.config = config

    def forward(self, waves: Float[Tensor, "b n"]) -> Float[Tensor, "b t bins"]:
        """The frames of each clip.

        Args:
            waves: one channel each, floating point, as a rule in -1..1, at the configured rate.

        Raises:
            UnsupportedShape: an empty clip, or integers.
        """
        if waves.shape[-1] < 1:
            raise UnsupportedShape(f"waves is {tuple(waves.shape)}; a clip needs at least one sample")
        if not waves.is_floating_point():
            raise UnsupportedShape(f"waves is {waves.dtype}; it must be floating point, in -1..1")
        config = self.config
        x = waves.to(torch.promote_types(waves.dtype, torch.float32))
        x = F.pad(x, (0, max(0, config.window - x.shape[-1])))
        window, filters = constants(config, x.device, x.dtype)
        with own_precision(x.device.type):
            if config.scale == "kaldi":
                energies = self._kaldi_powers(x, window) @ filters
                log = energies.clamp(min=torch.finfo(torch.float32).eps).log()
            else:
                log = self._logarithm(self._powers(x, window) @ filters)
        return (log - config.mean) / config.std

    def stream(
        self, waves: Float[Tensor, "b n"], kept: Float[Tensor, "b m"] | None = None
    ) -> tuple[Float[Tensor, "b t bins"], Float[Tensor, "b k"]]:
        """The frames that are complete when `waves` has followed on the samples `kept`, and what to keep now.

        Raises:
            UnsupportedCall: frames that depend on more than their window (`center=True`).
        """
        if self.config.center:
            raise UnsupportedCall("a spectrogram with center=True mirrors a clip at its ends; stream with center=False")
        x = waves if kept is None else torch.cat([kept, waves], dim=1)
        frames = max(0, (x.shape[1] - self.config.window) // self.config.hop + 1)
        if not frames:
            wide = torch.promote_types(x.dtype, torch.float32)
            return x.new_zeros(x.shape[0], 0, self.config.bins, dtype=wide), x.clone()
        # A copy, lest a few samples keep the memory of all.
        return self(x), x[:, frames * self.config.hop :].clone()

    def _powers(self, x: Tensor, window: Tensor) -> Float[Tensor, "b t frequencies"]:
        config = self.config
        spectrum = torch.stft(
            x, config.window, config.hop, window=window, center=config.center, pad_mode="reflect", return_complex=True
        )
        spectrum = spectrum[..., :-1] if config.log == "whisper" else spectrum
        return spectrum.abs().square().mT

    def _kaldi_powers(self, x: Tensor, window: Tensor) -> Float[Tensor, "b t frequencies"]:
        frames = x.unfold(-1, self.config.window, self.config.hop)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        return torch.fft.rfft((frames - 0.97 * before) * window, n=_fft_size(self.config)).abs().square()

    def _logarithm(self, energies: Float[Tensor, "b t bins"]) -> Float[Tensor, "b t bins"]:
        energies = energies.clamp(min=FLOOR)
        if self.config.log == "natural":
            return energies.log()
        log = energies.log10()
        if self.config.log == "log10":
            return log
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig(Config):
    """Masks of a spectrogram in training (SpecAugment, arXiv 1904.08779, section 2, without time warping).

    Args:
        time_masks, frequency_masks: how many of each; 0 switches them off.
        time_width: the widest mask in frames (T in the paper).
        frequency_width: the widest mask in bins (F).
        time_share: the widest mask as a fraction of the clip's frames (p).
    """

    time_masks: int = 0
    time_width: int = 40
    frequency_masks: int = 0
    frequency_width: int = 24
    time_share: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "time_width", "frequency_width")
        proportion(self, "time_share")
        not_negative(self, "time_masks", "frequency_masks", most=1024)


class SpecAugment(nn.Module):
    """Masks random stretches of time and bands of frequencies with zeros while training; each clip has its own.

    They are drawn from the global generator, which the recipes seed in every step.
    """

    def __init__(self, config: SpecAugmentConfig):
        super().__init__()
        self.config = config

    def forward(self, mel: Float[Tensor, "b t bins"]) -> Float[Tensor, "b t bins"]:
        config = self.config
        if not self.training or not (config.time_masks or config.frequency_masks):
            return mel
        from torchaudio.functional import mask_along_axis_iid

        time = min(config.time_width, int(mel.shape[1] * config.time_share))
        for count, axis, width in (
            (config.time_masks, 1, time),
            (config.frequency_masks, 2, min(config.frequency_width, mel.shape[2] - 1)),
        ):
            for _ in range(count if width else 0):
                # Widths are drawn below its argument; the paper's reach F and T.
                mel = mask_along_axis_iid(mel, width + 1, 0.0, axis)
        return mel
