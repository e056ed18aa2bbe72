"""The models that `omnimix bench models` compares with ours, and what each modality's models are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackage, UnknownName
from ..interop.importing import source_hidden, wanted
from ..modalities.audio.mel import LogMel, MelConfig
from ..modalities.models import create_model

TIMM, TRANSFORMERS = "timm:", "transformers:"
RATE = 16_000
_SIDE = 224
# The width, depth and heads of DeiT tiny (arXiv 2012.12877, table 1).
_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}


@dataclass(frozen=True, kw_only=True)
class Modality:
    """What the models of a modality are timed on.

    Args:
        noun: what a call is given, in the plural.
        unit: of its size.
        models: by default; the last one is the peer.
        sizes: by default.
        build: a model by name for a size.
        sample: what it is given, from size and batch.
    """

    noun: str
    unit: str
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    build: Callable[[str, int], nn.Module]
    sample: Callable[[int, int], Tensor]


class VideoPeer(nn.Module):
    """transformers' VideoMAE classifier (arXiv 2203.12602): a plain ViT over tubelets of all frames."""

    def __init__(self, frames: int):
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEForVideoClassification

        sizes: dict[str, Any] = _TINY | {"num_labels": 400}
        self.net = VideoMAEForVideoClassification(VideoMAEConfig(**sizes, num_frames=frames))

    def forward(self, videos: Tensor) -> Tensor:
        return self.net(videos.transpose(1, 2)).logits


class AudioPeer(nn.Module):
    """transformers' Audio Spectrogram Transformer (arXiv 2104.01778), on the spectrograms that ours computes."""

    def __init__(self, seconds: int):
        super().__init__()
        from transformers import ASTConfig, ASTForAudioClassification

        self.mel = LogMel(MelConfig.kaldi())
        steps = self.mel(torch.zeros(1, seconds * RATE)).shape[1]
        # Patches side by side, as those of AuM.
        sizes: dict[str, Any] = _TINY | {"frequency_stride": 16, "time_stride": 16, "num_labels": 527}
        self.net = ASTForAudioClassification(ASTConfig(**sizes, max_length=steps))

    def forward(self, waves: Tensor) -> Tensor:
        return self.net(self.mel(waves)).logits


def _timm(name: str, size: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingPackage("timm", f"the model {TIMM}{name}") from error
    known = timm.list_models()
    if name not in known:
        raise UnknownName("timm model", name, known)
    return timm.create_model(name, img_size=size)


def _transformers(peer: type[nn.Module], known: str, name: str, size: int) -> nn.Module:
    if name != known:
        raise UnknownName("transformers model", name, [known])
    wanted("transformers", f"the model {TRANSFORMERS}{name}", "hf")
    with source_hidden():
        return peer(size)


def image_model(name: str, size: int) -> nn.Module:
    """A model by name for square images of `size` pixels; "timm:NAME" is timm's.

    Raises:
        UnknownName: no such model here, or in timm.
    """
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), size)
    return create_model(name, size=size)


def video_model(name: str, size: int) -> nn.Module:
    """A model by name for clips of `size` frames; "transformers:videomae_tiny" is transformers'.

    Raises:
        UnknownName: no such model.
    """
    if name.startswith(TRANSFORMERS):
        return _transformers(VideoPeer, "videomae_tiny", name.removeprefix(TRANSFORMERS), size)
    return create_model(name, size=(size, _SIDE, _SIDE))


def audio_model(name: str, size: int) -> nn.Module:
    """A model by name for sounds of `size` seconds; "transformers:ast_tiny" is transformers'.

    Raises:
        UnknownName: no such model.
    """
    if name.startswith(TRANSFORMERS):
        return _transformers(AudioPeer, "ast_tiny", name.removeprefix(TRANSFORMERS), size)
    return create_model(name, seconds=float(size))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        noun="images",
        unit="pixels a side",
        models=("vig_tiny_patch16_224", f"{TIMM}deit_tiny_patch16_224"),
        sizes=(224, 512, 1024),
        build=image_model,
        sample=lambda size, batch: _noise(batch, 3, size, size),
    ),
    "video": Modality(
        noun="clips",
        unit=f"frames of {_SIDE} x {_SIDE}",
        models=("vivit_tiny_gla_patch16_224", "videomamba_tiny", f"{TRANSFORMERS}videomae_tiny"),
        sizes=(8, 32, 64),
        build=video_model,
        sample=lambda size, batch: _noise(batch, 3, size, _SIDE, _SIDE),
    ),
    "audio": Modality(
        noun="sounds",
        unit=f"seconds at {RATE} Hz",
        models=("ast_tiny_gla", "aum_tiny", f"{TRANSFORMERS}ast_tiny"),
        sizes=(10, 60, 240),
        build=audio_model,
        sample=lambda size, batch: _noise(batch, size * RATE),
    ),
}


def modality(name: str) -> Modality:
    """The modality of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in MODALITIES:
        raise UnknownName("modality", name, MODALITIES)
    return MODALITIES[name]
