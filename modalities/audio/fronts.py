"""Audio fronts: from waves to tokens. A new one is a class here with its options and its registration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import positive
from ...backbones.layout import Layout
from ...backbones.norm import RMSNorm
from ...backbones.registry import Registry
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedCall
from ..image.tokenizer import PatchTokenizer, PatchTokenizerConfig
from .convolution import Convolution, sinusoids
from .mel import LogMel, MelConfig, SpecAugment, SpecAugmentConfig


@dataclass(frozen=True, kw_only=True)
class FrontConfig(Config):
    """Base of every audio front's options.

    Args:
        positions: the position embedding; "none" adds none.
    """

    type: ClassVar[str]
    positions: str = "none"

    @property
    def has_positions(self) -> bool:
        """Whether the tokens have position embeddings."""
        return self.positions != "none"

    @property
    def sample_rate(self) -> int:
        """Samples a second of the waves that the front takes."""
        raise NotImplementedError(f"{type(self).__name__} does not say its rate")

    def fitted(self, rate: int, seconds: float) -> FrontConfig:
        """The same front for clips of this rate and length, as far as its options depend on them."""
        return self


@dataclass(frozen=True, kw_only=True)
class SpectrogramFrontConfig(FrontConfig):
    """Base of the options of fronts on a log-mel spectrogram.

    Args:
        mel: the spectrogram.
        augment: its masks in training.
    """

    mel: MelConfig = field(default_factory=MelConfig)
    augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)

    @property
    def sample_rate(self) -> int:
        return self.mel.rate

    def fitted(self, rate: int, seconds: float) -> FrontConfig:
        return replace(self, mel=self.mel.at_rate(rate))


@dataclass(frozen=True, kw_only=True)
class FrontState:
    """The streaming state of a causal front.

    Args:
        samples: how many samples were read.
        steps: how many tokens they gave.
        kept: samples, and inputs of convolutions, that later tokens depend on too, (b, n, ...) each.
    """

    samples: int
    steps: int
    kept: tuple[Tensor, ...]


class Front(nn.Module, ABC):
    """Clips of one length to tokens.

    Attributes:
        shortest: samples of the first token; a shorter clip is padded with silence at its end.
    """

    shortest: int = 1

    @abstractmethod
    def forward(self, waves: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        """The tokens of each clip, and where they are."""

    def stream(
        self, waves: Float[Tensor, "b n"], state: FrontState | None = None
    ) -> tuple[Float[Tensor, "b t d"], FrontState]:
        """The tokens, none or more, that further samples of each clip complete; of causal fronts, without masks.

        Raises:
            UnsupportedCall: the front does not stream.
        """
        raise UnsupportedCall(f"{type(self).__name__} hears whole clips and does not stream; use 'frames' or 'wave'")


FRONTS: Registry[Front] = Registry("audio front", base=FrontConfig)
register_front = FRONTS.register


def list_fronts() -> list[str]:
    """Names of all registered audio fronts."""
    return FRONTS.names()


@dataclass(frozen=True, kw_only=True)
class PatchFrontConfig(SpectrogramFrontConfig):
    """Options of the front `patches`.

    Args:
        mel: the spectrogram.
        augment: its masks in training.
        patch: frames and bins of a patch, one number or (time, frequency).
        frames: of the clips that positions are learned for; positions are interpolated for clips of any other length.
        positions: "factorised", one vector a time plus one a band of frequencies; "learned", one a patch; or "none".
        class_token: None; "first"; or "middle" of the tokens (Audio Mamba).
    """

    mel: MelConfig = field(default_factory=MelConfig.kaldi)
    patch: int | tuple[int, int] = 16
    frames: int = 1024
    positions: Literal["factorised", "learned", "none"] = "factorised"
    class_token: Literal["first", "middle"] | None = None

    def __post_init__(self) -> None:
        positive(self, "frames")
        object.__setattr__(self, "patch", self.grid(1).patch)

    def fitted(self, rate: int, seconds: float) -> FrontConfig:
        mel = self.mel.at_rate(rate)
        return replace(self, mel=mel, frames=mel.frames(round(seconds * rate)))

    def grid(self, dim: int) -> PatchTokenizerConfig:
        """How the spectrogram becomes tokens, taken for an image whose rows are its frames."""
        return PatchTokenizerConfig(
            dim=dim,
            patch=self.patch,
            channels=1,
            size=(self.frames, self.mel.bins),
            positions=self.positions,
            class_token=self.class_token,
        )


@register_front(
    "patches",
    PatchFrontConfig,
    summary="patches of a log-mel spectrogram",
    source="arXiv 2104.01778 (AST), 2406.03344 (Audio Mamba)",
    examples=(
        PatchFrontConfig(mel=MelConfig.kaldi(bins=16), patch=4, frames=24),
        PatchFrontConfig(mel=MelConfig(bins=12), patch=(8, 4), frames=16, positions="learned", class_token="middle"),
    ),
)
class PatchFront(Front):
    """Patches of a log-mel spectrogram, time by time and within a time from low to high frequencies.

    The layout's grid is (1, times, bands). Time comes first, other than in AST and Audio Mamba, so that the order of
    the tokens is the same in packed sequences, which have no grid, and so that what stands together sounds together.
    Zeros fill the spectrogram up to whole patches at its end.
    """

    def __init__(self, dim: int, config: PatchFrontConfig, causal: bool):
        super().__init__()
        if causal:
            raise ConfigError(
                "causal is True, but the front 'patches' fits its positions to the whole clip; use 'frames' or 'wave'"
            )
        self.mel, self.augment = LogMel(config.mel), SpecAugment(config.augment)
        self.patches = PatchTokenizer(config.grid(dim))

    def forward(self, waves: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        mel = self.augment(self.mel(waves)).to(self.patches.dtype)
        return self.patches(mel.unsqueeze(1))


@dataclass(frozen=True, kw_only=True)
class FrameFrontConfig(SpectrogramFrontConfig):
    """Options of the front `frames`.

    Args:
        mel: the spectrogram.
        augment: its masks in training.
        positions: "sinusoidal" or "none".
    """

    mel: MelConfig = field(default_factory=MelConfig.whisper)
    positions: Literal["sinusoidal", "none"] = "sinusoidal"

    def __post_init__(self) -> None:
        _check_positions(self.positions)


def _check_positions(positions: str) -> None:
    if positions not in ("sinusoidal", "none"):
        raise ConfigError(f"positions is {positions!r}; it must be 'sinusoidal' or 'none'")


@register_front(
    "frames",
    FrameFrontConfig,
    summary="frames of a log-mel spectrogram, two convolutions, a token every two frames",
    source="arXiv 2212.04356 (Whisper)",
    examples=(FrameFrontConfig(mel=MelConfig.whisper(bins=8)), FrameFrontConfig(mel=MelConfig.kaldi(bins=8))),
)
class FrameFront(Front):
    """Whisper's: two convolutions of three frames with GELUs, the second at every other frame; then positions.

    A token stands for 20 ms with the usual 10 ms between two frames. The layout's grid is (times, 1, 1).
    """

    def __init__(self, dim: int, config: FrameFrontConfig, causal: bool):
        super().__init__()
        if causal and config.mel.center:
            raise ConfigError(
                "mel.center is True, and a centred frame depends on later samples; causal models need "
                "MelConfig.kaldi() or center=False"
            )
        self.config, self.causal = config, causal
        self.mel, self.augment = LogMel(config.mel), SpecAugment(config.augment)
        pad = (2, 0) if causal else (1, 1)
        self.first = Convolution(config.mel.bins, dim, 3, 1, pad=pad)
        self.second = Convolution(dim, dim, 3, 2, pad=pad)
        self.shortest = config.mel.window

    def forward(self, waves: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        mel = self.augment(self.mel(waves))
        tokens = F.gelu(self.second(F.gelu(self.first(mel))))
        return _placed(tokens, self.config), Layout(causal=self.causal, grid=(tokens.shape[1], 1, 1))

    def stream(
        self, waves: Float[Tensor, "b n"], state: FrontState | None = None
    ) -> tuple[Float[Tensor, "b t d"], FrontState]:
        sound, first, second = (None, None, None) if state is None else state.kept
        x, sound = self.mel.stream(waves, sound)
        x, first = self.first.stream(x, first)
        x, second = self.second.stream(F.gelu(x), second)
        return _next(F.gelu(x), waves, self.config, state, (sound, first, second))


def _placed(
    tokens: Float[Tensor, "b t d"], config: FrameFrontConfig | WaveFrontConfig, start: int = 0
) -> Float[Tensor, "b t d"]:
    """The tokens with their positions from `start` on."""
    if config.positions == "none":
        return tokens
    return tokens + sinusoids(*tokens.shape[1:], start=start, device=tokens.device).to(tokens.dtype)


def _next(
    tokens: Float[Tensor, "b t d"],
    waves: Float[Tensor, "b n"],
    config: FrameFrontConfig | WaveFrontConfig,
    state: FrontState | None,
    kept: tuple[Tensor, ...],
) -> tuple[Float[Tensor, "b t d"], FrontState]:
    samples, steps = (0, 0) if state is None else (state.samples, state.steps)
    after = FrontState(samples=samples + waves.shape[1], steps=steps + tokens.shape[1], kept=kept)
    return _placed(tokens, config, steps), after


@dataclass(frozen=True, kw_only=True)
class WaveFrontConfig(FrontConfig):
    """Options of the front `wave`.

    Args:
        rate: samples a second.
        channels: of the convolutions; the tokens' width by default.
        kernels, strides: of the convolutions, one after the other. The defaults give a token every 20 ms that covers
            25 ms, at 16 kHz.
        positions: "sinusoidal" or "none".
    """

    rate: int = 16_000
    channels: int | None = None
    kernels: tuple[int, ...] | list[int] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] | list[int] = (5, 2, 2, 2, 2, 2, 2)
    positions: Literal["sinusoidal", "none"] = "sinusoidal"

    def __post_init__(self) -> None:
        positive(self, "rate", "channels")
        _check_positions(self.positions)
        for name in ("kernels", "strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        pairs = list(zip(self.kernels, self.strides, strict=False))
        if len(self.kernels) != len(self.strides) or not pairs or not all(k >= s >= 1 for k, s in pairs):
            raise ConfigError(
                f"WaveFrontConfig.kernels is {self.kernels} and strides {self.strides}; they must be as many, at least "
                "one, with every kernel at least its stride and no stride below 1"
            )

    @property
    def field(self) -> int:
        """Samples that one token depends on."""
        field = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            field = (field - 1) * stride + kernel
        return field

    @property
    def sample_rate(self) -> int:
        return self.rate

    def fitted(self, rate: int, seconds: float) -> FrontConfig:
        return replace(self, rate=rate)


@register_front(
    "wave",
    WaveFrontConfig,
    summary="strided convolutions of the wave itself",
    source="arXiv 2006.11477 (wav2vec 2.0)",
    examples=(
        WaveFrontConfig(channels=6, kernels=(10, 3), strides=(5, 2)),
        WaveFrontConfig(kernels=(400,), strides=(320,), positions="none"),
    ),
)
class WaveFront(Front):
    """The feature encoder of wav2vec 2.0: convolutions without padding, each followed by a norm and a GELU.

    The norm is an RMSNorm over the channels of each step, so that nothing depends on the rest of the clip. A clip
    shorter than a token is padded with silence at its end. The layout's grid is (times, 1, 1).
    """

    def __init__(self, dim: int, config: WaveFrontConfig, causal: bool):
        super().__init__()
        self.config, self.causal = config, causal
        channels = config.channels or dim
        widths = (1, *(channels for _ in config.kernels))
        self.convolutions = nn.ModuleList(
            Convolution(width, channels, kernel, stride, wide=width == 1)
            for width, kernel, stride in zip(widths, config.kernels, config.strides, strict=False)
        )
        self.norms = nn.ModuleList(RMSNorm(channels) for _ in config.kernels)
        self.proj = nn.Linear(channels, dim)
        nn.init.trunc_normal_(self.proj.weight, std=channels**-0.5)
        nn.init.zeros_(self.proj.bias)
        self.shortest = config.field

    def forward(self, waves: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        tokens, _ = self.stream(F.pad(waves, (0, max(0, self.shortest - waves.shape[1]))))
        return tokens, Layout(causal=self.causal, grid=(tokens.shape[1], 1, 1))

    def stream(
        self, waves: Float[Tensor, "b n"], state: FrontState | None = None
    ) -> tuple[Float[Tensor, "b t d"], FrontState]:
        x, kept = waves.unsqueeze(-1), []
        before = [None] * len(self.norms) if state is None else state.kept
        for convolution, norm, inputs in zip(self.convolutions, self.norms, before, strict=True):
            assert isinstance(convolution, Convolution)
            x, rest = convolution.stream(x, inputs)
            x = F.gelu(norm(x)) if x.shape[1] else x
            kept.append(rest)
        return _next(self.proj(x), waves, self.config, state, tuple(kept))
