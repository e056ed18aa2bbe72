"""Models that begin with audio."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import BackboneConfig, State, list_mixers
from ...backbones.heads import ClassificationHeadConfig
from ...backbones.scan import scan_orders
from ...backbones.typed import Config
from ...errors import ConfigError
from ..common.classifier import Classifier, Pool, parted, plain_backbone
from .fronts import (
    FRONTS,
    FrameFrontConfig,
    FrontConfig,
    FrontState,
    PatchFrontConfig,
    SpectrogramFrontConfig,
    WaveFrontConfig,
)
from .mel import MelConfig, SpecAugmentConfig
from .tokenizer import AudioTokenizer, AudioTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class AudioClassifierConfig(Config):
    """An audio classifier: tokenizer, backbone and head, whose widths agree."""

    audio: AudioTokenizerConfig
    backbone: BackboneConfig
    head: ClassificationHeadConfig

    def __post_init__(self) -> None:
        if self.audio.dim != self.backbone.dim:
            raise ConfigError(f"audio.dim is {self.audio.dim} and backbone.dim {self.backbone.dim}; they must be equal")
        if self.audio.causal and scan_orders(self.backbone.scan) != ("forward",):
            raise ConfigError(
                f"backbone.scan is {self.backbone.scan!r} with audio.causal; a causal model scans 'forward'"
            )
        if self.head.pool == "class_token" and getattr(self.audio.front, "class_token", None) is None:
            raise ConfigError(
                "head.pool is 'class_token', but the audio front has none; the front 'patches' has one with "
                "class_token='first' or 'middle'"
            )


@dataclass(frozen=True, kw_only=True)
class AudioState:
    """The streaming state of a causal classifier.

    Args:
        front: the state of its front.
        total: the sum of the tokens, (b, d), in float32 or float64.
        backbone: the state of the backbone; None before the first token.
    """

    front: FrontState
    total: Tensor
    backbone: State | None

    def detach(self) -> AudioState:
        """The same values without their history (truncated backpropagation)."""
        front = replace(self.front, kept=tuple(t.detach() for t in self.front.kept))
        kept = None if self.backbone is None else self.backbone.detach()
        return AudioState(front=front, total=self.total.detach(), backbone=kept)

    @property
    def nbytes(self) -> int:
        """Memory that the tensors hold."""
        own = sum(t.numel() * t.element_size() for t in (self.total, *self.front.kept))
        return own + (0 if self.backbone is None else self.backbone.nbytes)


@dataclass(frozen=True, kw_only=True)
class AudioStep:
    """The outputs for a chunk of audio.

    Args:
        now: logits of each token that the chunk completed, (b, steps, classes).
        so_far: logits of the sound up to here, (b, classes), from the mean of all tokens; None before the first token.
        state: pass it with the next chunk.
    """

    now: Tensor
    so_far: Tensor | None
    state: AudioState


class AudioClassifier(Classifier):
    """Sounds of any length to logits.

    `forward` takes waves, one channel each, floating point, at `config.audio.rate` samples a second: clips of one
    length as (b, n), or a list of clips (n,) of different lengths, which run packed, without padding. A causal model
    also takes them in pieces:

    Example:
        >>> state = None
        >>> for chunk in chunks:                    # (b, any number of samples)
        ...     step = model.stream(chunk, state)
        ...     state = step.state
        >>> logits = model.finish(state).so_far     # those of the whole sound at once
    """

    config_class = AudioClassifierConfig
    tokenizer: AudioTokenizer

    def __init__(self, config: AudioClassifierConfig):
        super().__init__(AudioTokenizer(config.audio), config.backbone, config.head)

    @classmethod
    def examples(cls) -> list[tuple[AudioClassifierConfig, list[Any]]]:
        sound = torch.linspace(-9, 9, 900).sin() * torch.linspace(0, 20, 900).square().cos()
        clips = torch.stack([0.1 * sound, 0.2 * sound.flip(0)])
        batches = [clips, clips[:, 300:], [clips[0, 100:], clips[1, :30], clips[0, :800]]]
        small: dict[str, Any] = {"dim": 16, "depth": 1, "classes": 3}
        mel: dict[str, Any] = {"rate": 4000, "bins": 8}
        return [
            (
                audio_classifier(
                    mixer="gla", **small, **mel, seconds=0.2, patch=4, class_token="middle", pool="class_token"
                ),
                batches,
            ),
            (audio_classifier(mixer="attention", **small, **mel, front="frames", pool="max"), batches),
            (audio_classifier(mixer="mamba2", **small, **mel, front="frames", causal=True), batches),
            (
                audio_classifier(
                    mixer="linear",
                    **small,
                    front=WaveFrontConfig(channels=6, kernels=(10, 3), strides=(5, 2)),
                ),
                batches,
            ),
        ]

    @property
    def config(self) -> AudioClassifierConfig:
        """The configuration that builds this model as it is now."""
        return AudioClassifierConfig(audio=self.tokenizer.config, backbone=self.backbone.config, head=self.head.config)

    def stream(self, chunk: Float[Tensor, "b n"], state: AudioState | None = None) -> AudioStep:
        """Process the next samples of a stream.

        Args:
            chunk: any number of samples.
            state: the state that the previous call returned; None starts a stream.

        Raises:
            UnsupportedCall: the model is not causal, one of its mixers does not stream, or its head does not pool by
                the mean.
            UnsupportedShape: the chunk is not a floating-point (b, n), or does not fit the state.
        """
        self.check_streaming()
        tokens, layout, front = self.tokenizer.stream(chunk, None if state is None else state.front)
        memory, total = (None, 0.0) if state is None else (state.backbone, state.total)
        if tokens.shape[1]:
            tokens, memory = self.backbone(tokens, layout, memory)[:2]
        total = tokens.sum(1, dtype=torch.promote_types(tokens.dtype, torch.float32)) + total
        so_far = self.head_of((total / front.steps).to(tokens.dtype)) if front.steps else None
        after = AudioState(front=front, total=total, backbone=memory)
        return AudioStep(now=self.head_of(tokens), so_far=so_far, state=after)

    def finish(self, state: AudioState) -> AudioStep:
        """End the stream. Audio too short for one token is padded with silence, as whole clips are."""
        missing = max(0, self.tokenizer.front.shortest - state.front.samples)
        return self.stream(state.total.new_zeros(state.total.shape[0], missing), state)


def audio_front(
    front: str,
    *,
    rate: int = 16_000,
    seconds: float = 10.24,
    patch: int | tuple[int, int] = 16,
    bins: int | None = None,
    positions: str | None = None,
    class_token: Literal["first", "middle"] | None = None,
    causal: bool = False,
    augment: SpecAugmentConfig | None = None,
) -> FrontConfig:
    """The usual options of a front.

    Args:
        front: "patches", "frames" or "wave".
        rate: samples a second of the waves.
        seconds: length of the clips for which positions are learned, where the front learns them. Clips of any other
            length are served too: their positions are interpolated.
        patch: frames and bins of a patch, one number or (time, frequency).
        bins: mel filters; 128 for patches and 80 for frames by default.
        positions: "factorised", "learned" or "none" for patches; "sinusoidal" or "none" for the others.
        class_token: None, "first" or "middle", for patches.
        causal: whether a token depends on earlier samples only.
        augment: masks of the spectrogram in training; not for waves.

    Raises:
        UnknownName: an unknown front.
        ConfigError: an option that this front does not have.
    """
    kind = FRONTS.get(front).config
    if seconds <= 0:
        raise ConfigError(f"seconds is {seconds}; it must be above 0")
    if class_token is not None and kind is not PatchFrontConfig:
        raise ConfigError(f"class_token is {class_token!r}; only the front 'patches' adds one, and front is {front!r}")
    chosen: dict[str, Any] = {} if positions is None else {"positions": positions}
    if augment is not None and not issubclass(kind, SpectrogramFrontConfig):
        raise ConfigError(f"augment masks spectrograms, and the front {front!r} has none; leave it out")
    if augment is not None:
        chosen["augment"] = augment
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
    backbone: BackboneConfig | None = None,
    *,
    classes: int = 527,
    front: FrontConfig | str = "patches",
    causal: bool = False,
    pool: Pool = "mean",
    dropout: float = 0.0,
    **options: Any,
) -> AudioClassifierConfig:
    """The configuration of a classifier of sounds around any backbone; plain and ViT-shaped from its short form.

    Args:
        backbone: the whole configuration, or None for the short form, whose scan is "bidirectional", or "forward"
            where `causal`. Packed clips are served by these two.
        front: "patches", "frames" or "wave"; or its configuration, which replaces what `options` say of it.
        causal: a token depends on earlier samples only, so that the model streams; not for patches.
        options: those of `audio_front`, and the short form of the backbone: see `plain_backbone`.

    Raises:
        UnknownName, ConfigError: unknown names, and parts that do not fit together.
    """
    own, short = parted(options, inspect.signature(audio_front).parameters.keys() - {"front", "causal"})
    if isinstance(front, str):
        front = audio_front(front, causal=causal, **own)
    if backbone is None and short.get("scan") is None:
        short["scan"] = "forward" if causal else "bidirectional"
    backbone = plain_backbone(backbone, positions=front.has_positions, **short)
    return AudioClassifierConfig(
        audio=AudioTokenizerConfig(dim=backbone.dim, front=front, causal=causal),
        backbone=backbone,
        head=ClassificationHeadConfig(classes=classes, pool=pool, dropout=dropout),
    )


# Audio Mamba (arXiv 2406.03344): Vision Mamba on the patches of a spectrogram, its class token in their middle.
_AUM = {
    "mixer": "mamba",
    "depth": 24,
    "ffn": None,
    "positions": "learned",
    "class_token": "middle",
    "pool": "class_token",
}
AUDIO_MODELS: dict[str, dict[str, Any]] = {
    "aum_tiny": _AUM | {"dim": 192},
    "aum_small": _AUM | {"dim": 384},
    "aum_base": _AUM | {"dim": 768},
} | {f"ast_tiny_{mixer}": {"mixer": mixer, "dim": 192, "depth": 12} for mixer in list_mixers()}
