"""Audio classification: `omnimix audio fit`, `validate` and `test`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import BackboneConfig
from ...errors import ConfigError
from ...modalities.audio.fronts import FrameFrontConfig, FrontConfig, PatchFrontConfig
from ...modalities.audio.mel import LogMel, MelConfig, SpecAugmentConfig
from ...modalities.audio.model import AudioClassifier, audio_classifier
from ..common.classification import Baseline, Classification, ClassificationTrainingConfig, Look, finish
from ..common.cli import RecipeCLI, evaluate, run_fit
from .data import AudioData, AudioFolderData, SoundsData
from .order_blind import order_blind

RECIPE = "audio_classification"
__all__ = ["AudioClassification", "AudioFolderData", "SoundsData"]

# Whisper's logarithms lie between -1 and 1.5 or so; the tokens of other media have about this deviation.
_MEAN, _STD = 0.2, 0.4
_TRAINING = ClassificationTrainingConfig()
_BACKBONE = BackboneConfig(dim=64, depth=2, pattern=("gated_deltanet",), scan="both")


@dataclass(frozen=True, kw_only=True)
class SpectrogramConfig:
    """What the fronts "patches" and "frames" see of a sound: a log-mel spectrogram, scaled as Whisper's.

    Args:
        bins: mel filters.
        step: milliseconds between two frames.
        patch: frames and bins of a patch; of the front "patches".
        positions: "factorised", "learned" or "none" for patches, "sinusoidal" or "none" for frames; null is the first.
        time_masks, frequency_masks: stretches and bands that are hidden in training.
        time_width: the widest stretch, in frames.
        frequency_width: the widest band, in bins.
    """

    bins: int = 64
    step: float = 10.0
    patch: tuple[int, int] = (16, 16)
    positions: str | None = None
    time_masks: int = 1
    time_width: int = 10
    frequency_masks: int = 1
    frequency_width: int = 10

    def mel(self, rate: int) -> MelConfig:
        """The spectrogram of sounds of this rate."""
        plain = MelConfig.whisper(rate=rate, bins=self.bins)
        return replace(plain, hop=max(1, round(rate * self.step / 1000)), mean=_MEAN, std=_STD)

    def fronts(self, rate: int, seconds: float | None) -> dict[str, FrontConfig]:
        """The options of the fronts that see spectrograms."""
        mel = self.mel(rate)
        augment = SpecAugmentConfig(
            time_masks=self.time_masks,
            time_width=self.time_width,
            frequency_masks=self.frequency_masks,
            frequency_width=self.frequency_width,
        )
        chosen = {} if self.positions is None else {"positions": self.positions}
        frames = mel.frames(round((seconds or 10.0) * rate))
        return {
            "frames": FrameFrontConfig(mel=mel, augment=augment, **chosen),
            "patches": PatchFrontConfig(mel=mel, augment=augment, patch=tuple(self.patch), frames=frames, **chosen),
        }


class AudioClassification(Classification):
    """A classifier of sounds and how it is trained.

    Args:
        backbone: the configuration of the blocks; see `BackboneConfig`.
        front: how waves become tokens: "frames" or "patches" of a spectrogram, or the "wave" itself.
        spectrogram: what the first two see.
        training: optimiser, schedule, regularisation and averaging.
        order_blind_epochs: for so many epochs another model is trained that hears all moments of a sound but not their
            order, to compare with; 0 leaves it out.
        sounds: samples a second, seconds (null: any) and the number of classes; the data says it.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig = _BACKBONE,
        front: str = "frames",
        spectrogram: SpectrogramConfig = SpectrogramConfig(),
        training: ClassificationTrainingConfig = _TRAINING,
        order_blind_epochs: int = 12,
        sounds: tuple[int, float | None, int] = (16_000, 1.2, 12),
    ):
        if order_blind_epochs < 0:
            raise ConfigError(f"model.order_blind_epochs is {order_blind_epochs}; it must be at least 0")
        rate, seconds, classes = sounds
        fronts = spectrogram.fronts(rate, seconds)
        options = {"fronts": {front: fronts[front]}} if front in fronts else {"rate": rate}
        model = AudioClassifier(audio_classifier(backbone, classes=classes, front=front, **options))
        super().__init__(model, medium="audio", training=training, classes=classes)
        self.spectrogram, self.rate, self.order_blind_epochs = spectrogram, rate, order_blind_epochs


def fit(argv: list[str]) -> int:
    """`omnimix audio fit`."""
    return run_fit("audio", argv, _cli, _finish)


def _cli(command: str, argv: list[str]) -> RecipeCLI:
    return RecipeCLI(
        command,
        model=AudioClassification,
        data=AudioData,
        recipe=RECIPE,
        argv=argv,
        links=[("sounds", "sounds")],
        monitor="val/acc1",
        mode="max",
    )


def _finish(cli: RecipeCLI) -> None:
    module: AudioClassification = cli.model
    mel = LogMel(replace(module.spectrogram.mel(module.rate), mean=0.0, std=1.0))
    look = Look(noun="sounds", picture=lambda wave: picture(mel(wave[None])[0]), columns=9, rows=4, height=5.4)
    finish(cli, look, _order_blind)


def _order_blind(cli: RecipeCLI) -> Baseline | None:
    module: AudioClassification = cli.model
    if not module.order_blind_epochs:
        return None
    data: AudioData = cli.datamodule
    return order_blind(
        data.heard(data.train_set),
        data.val_set,
        LogMel(module.spectrogram.mel(module.rate)),
        classes=data.classes,
        epochs=module.order_blind_epochs,
        seed=cli.options.seed_everything,
    )


def picture(mel: Float[Tensor, "t bins"]) -> Float[Tensor, "3 bins t"]:
    """A spectrogram as an image: time goes across, frequency up, and what is loud is bright."""
    from matplotlib import colormaps

    shade = (mel - mel.amin()) / (mel.amax() - mel.amin()).clamp_min(1e-6)
    return torch.from_numpy(colormaps["magma"](shade.mT.flip(0).numpy())[..., :3]).permute(2, 0, 1).float()


def validate(argv: list[str]) -> int:
    """`omnimix audio validate`."""
    return evaluate("validate", argv, _cli)


def test(argv: list[str]) -> int:
    """`omnimix audio test`."""
    return evaluate("test", argv, _cli)
