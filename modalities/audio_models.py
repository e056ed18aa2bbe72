"""Models that begin with audio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..backbones import BackboneConfig, list_mixers
from ..backbones.heads import ClassificationHeadConfig
from ..errors import ConfigError
from .audio import AudioTokenizer, AudioTokenizerConfig
from .classifier import Classifier, plain_backbone
from .fronts import FRONTS, FrameFrontConfig, FrontConfig, PatchFrontConfig, WaveFrontConfig
from .mel import MelConfig


@dataclass(frozen=True, kw_only=True)
class AudioClassifierConfig:
    """An audio classifier: tokenizer, backbone and head, whose widths agree."""

    audio: AudioTokenizerConfig
    backbone: BackboneConfig
    head: ClassificationHeadConfig

    def __post_init__(self) -> None:
        if self.audio.dim != self.backbone.dim:
            raise ConfigError(f"audio.dim is {self.audio.dim} and backbone.dim {self.backbone.dim}; they must be equal")
        if self.head.pool == "class_token" and getattr(self.audio.options, "class_token", None) is None:
            raise ConfigError(
                "head.pool is 'class_token', but the audio front has none; the front 'patches' has one with "
                "class_token='first' or 'middle'"
            )


class AudioClassifier(Classifier):
    """Sounds of any length to logits.

    `forward` takes waves, one channel each, floating point, at `config.audio.rate` samples a second: clips of one
    length as (b, n), or a list of clips (n,) of different lengths, which run packed, without padding.
    """

    config_class = AudioClassifierConfig

    def __init__(self, config: AudioClassifierConfig):
        super().__init__(AudioTokenizer(config.audio), config.backbone, config.head)

    @property
    def config(self) -> AudioClassifierConfig:
        """The configuration that builds this model as it is now."""
        return AudioClassifierConfig(audio=self.tokenizer.config, backbone=self.backbone.config, head=self.head.config)


def audio_front(
    front: str,
    *,
    rate: int = 16_000,
    seconds: float = 10.24,
    patch: int | tuple[int, int] = 16,
    bins: int | None = None,
    positions: str | None = None,
    class_token: str | None = None,
    causal: bool = False,
) -> FrontConfig:
    """The usual options of a front; see `audio_classifier` for the arguments.

    Raises:
        UnknownName: no such front.
        ConfigError: an option that this front does not have.
    """
    kind = FRONTS.get(front).config
    if seconds <= 0:
        raise ConfigError(f"seconds is {seconds}; it must be above 0")
    if class_token is not None and kind is not PatchFrontConfig:
        raise ConfigError(f"class_token is {class_token!r}; only the front 'patches' adds one, and front is {front!r}")
    chosen: dict[str, Any] = {} if positions is None else {"positions": positions}
    if kind is PatchFrontConfig:
        mel = MelConfig.kaldi(rate=rate, bins=bins or 128)
        frames = max(1, round(seconds * rate / mel.hop))
        return PatchFrontConfig(mel=mel, patch=patch, frames=frames, class_token=class_token, **chosen)
    if kind is FrameFrontConfig:
        mel = MelConfig.kaldi(rate=rate, bins=bins or 80) if causal else MelConfig.whisper(rate=rate, bins=bins or 80)
        return FrameFrontConfig(mel=mel, **chosen)
    if kind is WaveFrontConfig:
        return WaveFrontConfig(rate=rate, **chosen)
    return kind(**chosen)


def audio_classifier(
    *,
    mixer: str,
    dim: int,
    depth: int,
    classes: int = 527,
    front: str = "patches",
    rate: int = 16_000,
    seconds: float = 10.24,
    patch: int | tuple[int, int] = 16,
    bins: int | None = None,
    positions: str | None = None,
    class_token: str | None = None,
    pool: str = "mean",
    channel: str | None = "swiglu",
    causal: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    fronts: dict[str, FrontConfig] | None = None,
) -> AudioClassifierConfig:
    """The configuration of a plain classifier around one mixer (or several, "attention+gla").

    Mixers that only look backwards run in both directions, unless the model is causal. Attention has no rotary
    positions where the tokens bring positions.

    Args:
        front: "patches", "frames" or "wave".
        rate: samples a second of the waves.
        seconds: length of the clips for which positions are learned, where the front learns them. Clips of any other
            length are served too: their positions are interpolated.
        patch: frames and bins of a patch, one number or (time, frequency).
        bins: mel filters; 128 for patches and 80 for frames by default.
        positions: "factorised", "learned" or "none" for patches; "sinusoidal" or "none" for the others.
        class_token: None, "first" or "middle", for patches.
        causal: a token hears only what came before, so that the model streams; not for patches.
        fronts: options by front; those of this front replace the ones that the arguments above describe.
    """
    options = dict(fronts or {})
    if front not in options:
        options[front] = audio_front(
            front,
            rate=rate,
            seconds=seconds,
            patch=patch,
            bins=bins,
            positions=positions,
            class_token=class_token,
            causal=causal,
        )
    audio = AudioTokenizerConfig(dim=dim, front=front, fronts=options, causal=causal)
    return AudioClassifierConfig(
        audio=audio,
        backbone=plain_backbone(
            mixer=mixer,
            dim=dim,
            depth=depth,
            positions=audio.options.has_positions,
            scan="forward" if causal else "both",
            channel=channel,
            drop_path=drop_path,
        ),
        head=ClassificationHeadConfig(classes=classes, pool=pool, dropout=dropout),
    )


# Audio Mamba (arXiv 2406.03344): Vision Mamba on the patches of a spectrogram, its class token in their middle.
_AUM = {
    "mixer": "mamba",
    "depth": 24,
    "channel": None,
    "positions": "learned",
    "class_token": "middle",
    "pool": "class_token",
}
AUDIO_MODELS: dict[str, dict[str, Any]] = {
    "aum_tiny": _AUM | {"dim": 192},
    "aum_small": _AUM | {"dim": 384},
    "aum_base": _AUM | {"dim": 768},
} | {f"ast_tiny_{mixer}": {"mixer": mixer, "dim": 192, "depth": 12} for mixer in list_mixers()}
