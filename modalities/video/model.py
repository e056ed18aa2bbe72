"""Models that begin with videos, whole or streamed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import BackboneConfig, State, list_mixers
from ...backbones.heads import ClassificationHeadConfig
from ...backbones.scan import needs_rows, scan_orders
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..common.classifier import Classifier, Pool, parted, plain_backbone
from .reduction import Grid
from .tokenizer import TubeletTokenizer, TubeletTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class VideoClassifierConfig(Config):
    """A video classifier: tokenizer, backbone and head, whose widths agree."""

    video: TubeletTokenizerConfig
    backbone: BackboneConfig
    head: ClassificationHeadConfig

    def __post_init__(self) -> None:
        video, scan = self.video, self.backbone.scan
        if video.dim != self.backbone.dim:
            raise ConfigError(f"video.dim is {video.dim} and backbone.dim {self.backbone.dim}; they must be equal")
        if self.head.pool == "class_token" and video.class_token is None:
            raise ConfigError("head.pool is 'class_token', but video.class_token is None; set 'first' or 'middle'")
        if video.causal and scan_orders(scan) != ("forward",):
            raise ConfigError(f"backbone.scan is {scan!r} with video.causal; a causal model scans 'forward'")
        rowed = [order for order in scan_orders(scan) if needs_rows(order)]
        if video.merge is not None and rowed:
            raise UnsupportedCall(
                f"backbone.scan is {scan!r} with video.merge; merged tokens have no rows and columns for the order "
                f"{rowed[0]!r}; use 'bidirectional', 'temporal-first' or 'cross-3d'"
            )

    def resized(self, size: Grid) -> VideoClassifierConfig:
        """The configuration for videos of another size (t, h, w)."""
        return replace(self, video=replace(self.video, size=size))


@dataclass(frozen=True, kw_only=True)
class VideoState:
    """The streaming state of a causal classifier.

    Args:
        waiting: frames of an incomplete time step, (b, c, n, h, w).
        total: the sum over the time steps of their mean token, (b, d), in float32 or float64.
        steps: time steps so far.
        backbone: the state of the backbone; None before the first step.
    """

    waiting: Tensor
    total: Tensor
    steps: int
    backbone: State | None

    def detach(self) -> VideoState:
        """The same values without their history (truncated backpropagation)."""
        kept = None if self.backbone is None else self.backbone.detach()
        return replace(self, waiting=self.waiting.detach(), total=self.total.detach(), backbone=kept)

    @property
    def nbytes(self) -> int:
        """Memory that the tensors hold."""
        own = sum(t.numel() * t.element_size() for t in (self.waiting, self.total))
        return own + (0 if self.backbone is None else self.backbone.nbytes)


@dataclass(frozen=True, kw_only=True)
class VideoStep:
    """The outputs for a chunk of a video.

    Args:
        now: logits of each time step that the chunk completed, (b, steps, classes), from the mean of the step's tokens.
        so_far: logits of the video up to here, (b, classes), from the mean of all tokens; None before the first step.
        state: pass it with the next chunk.
    """

    now: Tensor
    so_far: Tensor | None
    state: VideoState


class VideoClassifier(Classifier):
    """Videos of any length and size to logits.

    `forward` takes videos (b, c, t, h, w), floating point, normalised as the model was trained. A model whose
    tokenizer is causal also takes them in pieces:

    Example:
        >>> state = None
        >>> for chunk in chunks:                    # (b, c, any number of frames, h, w)
        ...     step = model.stream(chunk, state)
        ...     state = step.state
        >>> logits = model.finish(state).so_far     # those of the whole video at once
    """

    config_class = VideoClassifierConfig
    tokenizer: TubeletTokenizer

    def __init__(self, config: VideoClassifierConfig):
        super().__init__(TubeletTokenizer(config.video), config.backbone, config.head)

    @classmethod
    def examples(cls) -> list[tuple[VideoClassifierConfig, list[Tensor]]]:
        small: dict[str, Any] = {"dim": 16, "depth": 2, "classes": 3, "size": (4, 16, 16), "tubelet": (1, 8, 8)}
        videos = [torch.randn(2, 3, 4, 16, 16), torch.randn(3, 3, 5, 20, 13)]
        options: list[dict[str, Any]] = [
            # A class token in front has no past, and the last forward direction no gradient to its decay.
            _VIDEOMAMBA | {"class_token": "middle"},
            {"mixer": "mamba2,attention", "scan": "cross-3d", "group": (2, 1, 1), "merge": 3},
            {"mixer": "gla", "tubelet": (2, 8, 8), "causal": True},
        ]
        return [(video_classifier(**small | option), videos) for option in options]

    @property
    def config(self) -> VideoClassifierConfig:
        """The configuration that builds this model as it is now, resized or with another head."""
        return VideoClassifierConfig(video=self.tokenizer.config, backbone=self.backbone.config, head=self.head.config)

    def stream(self, chunk: Float[Tensor, "b c t h w"], state: VideoState | None = None) -> VideoStep:
        """Process the next frames of a stream.

        Frames of an incomplete time step (`config.video.step` frames) are kept in the state.

        Args:
            chunk: any number of frames.
            state: the state that the previous call returned; None starts a stream.

        Raises:
            UnsupportedCall: the model is not causal, one of its mixers does not stream, or its head does not pool by
                the mean.
            UnsupportedShape: the chunk is not what the tokenizer takes, or does not fit the state.
        """
        self.check_streaming()
        self.tokenizer.check(chunk)
        if state is not None:
            # Without the frames, which may be any number.
            shapes = [(*t.shape[:2], *t.shape[3:]) for t in (chunk, state.waiting)]
            if shapes[0] != shapes[1]:
                raise UnsupportedShape(f"chunk is (b, c, h, w) = {shapes[0]}, and that of the stream is {shapes[1]}")
            chunk = torch.cat([state.waiting, chunk], dim=2)
        whole = chunk.shape[2] - chunk.shape[2] % self.tokenizer.config.step
        # A copy, lest a few frames keep the memory of the chunk.
        return self._advance(chunk[:, :, :whole], chunk[:, :, whole:].clone(), state)

    def finish(self, state: VideoState) -> VideoStep:
        """End the stream: the remaining frames become a last time step, padded as that of a whole video is."""
        return self._advance(state.waiting, state.waiting[:, :, :0], state)

    def _advance(self, frames: Tensor, waiting: Tensor, state: VideoState | None) -> VideoStep:
        """`frames` fill time steps, at the end of a video but for the last; `waiting` do not."""
        steps, total, memory = (0, 0.0, None) if state is None else (state.steps, state.total, state.backbone)
        if frames.shape[2]:
            tokens, layout = self.tokenizer(frames, start=steps * self.tokenizer.config.group[0])
            tokens, memory = self.backbone(tokens, layout, memory)[:2]
            means = tokens.unflatten(1, (layout.grid[0], -1)).mean(2)
            total = total + means.sum(1, dtype=torch.promote_types(means.dtype, torch.float32))
            steps += layout.grid[0]
        else:
            means = frames.new_zeros(frames.shape[0], 0, self.backbone.config.dim)
            total = means.sum(1, dtype=torch.promote_types(means.dtype, torch.float32)) + total
        so_far = self.head_of((total / steps).to(means.dtype)) if steps else None
        state = VideoState(waiting=waiting, total=total, steps=steps, backbone=memory)
        return VideoStep(now=self.head_of(means), so_far=so_far, state=state)


def video_classifier(
    backbone: BackboneConfig | None = None,
    *,
    classes: int = 400,
    pool: Pool = "mean",
    dropout: float = 0.0,
    **options: Any,
) -> VideoClassifierConfig:
    """The configuration of a classifier of videos around any backbone; plain and ViT-shaped from its short form.

    Args:
        backbone: the whole configuration, or None for the short form, whose scan is "bidirectional", spatial first, or
            "forward" where `causal`.
        options: fields of `TubeletTokenizerConfig` (size, tubelet, channels, positions, time_positions, class_token,
            registers, group, merge, causal), and the short form of the backbone: see `plain_backbone`.

    Raises:
        UnknownName, ConfigError, UnsupportedCall: unknown names, and parts that do not fit together.
    """
    video, short = parted(options, {field.name for field in fields(TubeletTokenizerConfig)} - {"dim"})
    if backbone is None and short.get("scan") is None:
        short["scan"] = "forward" if video.get("causal") else "bidirectional"
    positions = video.get("positions", TubeletTokenizerConfig.positions) != "none"
    backbone = plain_backbone(backbone, positions=positions, **short)
    return VideoClassifierConfig(
        video=TubeletTokenizerConfig(dim=backbone.dim, **video),
        backbone=backbone,
        head=ClassificationHeadConfig(classes=classes, pool=pool, dropout=dropout),
    )


# VideoMamba, published with 7, 26 and 74 million parameters (arXiv 2403.06977, section 3.2 and table 3).
_VIDEOMAMBA = {"mixer": "mamba", "ffn": None, "class_token": "first", "pool": "class_token"}
VIDEO_MODELS: dict[str, dict[str, Any]] = {
    "videomamba_tiny": _VIDEOMAMBA | {"dim": 192, "depth": 24},
    "videomamba_small": _VIDEOMAMBA | {"dim": 384, "depth": 24},
    "videomamba_middle": _VIDEOMAMBA | {"dim": 576, "depth": 32},
} | {
    f"vivit_tiny_{mixer}_patch16_224": {
        "mixer": mixer,
        "dim": 192,
        "depth": 12,
        "size": (16, 224, 224),
        "tubelet": (2, 16, 16),
    }
    for mixer in list_mixers()
}
