"""Audio classification: `omnimix audio fit`, `validate` and `test`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import BackboneConfig
from ...backbones.config import configured
from ...errors import ConfigError
from ...modalities.audio.fronts import FrameFrontConfig, FrontConfig, PatchFrontConfig, SpectrogramFrontConfig
from ...modalities.audio.mel import LogMel, MelConfig, SpecAugmentConfig
from ...modalities.audio.model import AudioClassifier, audio_classifier
from ..common.classification import Baseline, Classification, ClassificationTrainingConfig, Look, finish
from ..common.cli import NOTHING, RecipeCLI
from ..common.commands import evaluate, run_fit
from ..common.training import EvenSteps
from .data import AudioData, AudioFolderData, SoundsData
from .order_blind import order_blind

RECIPE = "audio_classification"
__all__ = ["AudioClassification", "AudioFolderData", "SoundsData"]

# Whisper's logarithms lie between -1 and 1.5 or so; the tokens of other media have about this deviation.
_MEAN, _STD = 0.2, 0.4
_TRAINING = ClassificationTrainingConfig()
_BACKBONE = BackboneConfig(dim=64, depth=2, pattern=("gated_deltanet",), scan="bidirectional")


# Fronts as the recipe has them where they are named; sizes in samples are for 16 kHz.
_MEL = replace(MelConfig.whisper(bins=64), mean=_MEAN, std=_STD)
_MASKS = SpecAugmentConfig(time_masks=1, time_width=10, frequency_masks=1, frequency_width=10)
_FRONTS: dict[str, FrontConfig] = {
    "frames": FrameFrontConfig(mel=_MEL, augment=_MASKS),
    "patches": PatchFrontConfig(mel=_MEL, augment=_MASKS),
}
# Seconds that positions are learned for where clips have any length.
_USUAL = 10.0


class AudioClassification(EvenSteps, Classification):
    """An audio classifier and how it is trained.

    Args:
        backbone: the configuration of the blocks; see `BackboneConfig`.
        front: how waves become tokens, by name or configuration: "frames" or "patches" of a spectrogram, or the "wave"
            itself. It is fitted to the rate and the length of the sounds.
        training: optimiser, schedule, regularisation and averaging.
        order_blind_epochs: how many epochs to train an order-blind baseline, which sees the frames of a sound as a set;
            0 trains none.
        sounds: samples a second, seconds (null: any) and the number of classes; set by the data.
    """

    starts: ClassVar[dict[str, dict[str, FrontConfig]]] = {"front": _FRONTS}

    def __init__(
        self,
        *,
        backbone: BackboneConfig = _BACKBONE,
        front: FrontConfig | str = "frames",
        training: ClassificationTrainingConfig = _TRAINING,
        order_blind_epochs: int = 12,
        sounds: tuple[int, float | None, int] = (16_000, 1.2, 12),
    ):
        if order_blind_epochs < 0:
            raise ConfigError(f"model.order_blind_epochs is {order_blind_epochs}; it must be at least 0")
        rate, seconds, classes = sounds
        chosen = _FRONTS.get(front) or configured(FrontConfig, front) if isinstance(front, str) else front
        chosen = chosen.fitted(rate, seconds or _USUAL)
        if chosen.sample_rate != rate:
            raise ConfigError(
                f"model.front takes {chosen.sample_rate} samples a second, and the data has {rate}: set data.rate"
            )
        model = AudioClassifier(audio_classifier(backbone, classes=classes, front=chosen))
        super().__init__(model, input_name="audio", training=training, classes=classes)
        # What the report shows and the baseline sees, also where the model itself sees no spectrogram.
        self.mel = chosen.mel if isinstance(chosen, SpectrogramFrontConfig) else _MEL.at_rate(rate)
        self.order_blind_epochs = order_blind_epochs


def fit(argv: list[str], objects: Mapping[str, Any] = NOTHING) -> int:
    """`omnimix audio fit`."""
    return run_fit("audio", argv, partial(make_cli, objects=objects), _finish)


# What the data says -> the argument of the model.
LINKS = [("sounds", "sounds")]


def make_cli(command: str, argv: list[str], objects: Mapping[str, Any] = NOTHING) -> RecipeCLI:
    """The command line of a subcommand; see `RecipeCLI`."""
    return RecipeCLI(
        command,
        model=AudioClassification,
        data=AudioData,
        recipe=RECIPE,
        argv=argv,
        objects=objects,
        links=LINKS,
        monitor="val/acc1",
        mode="max",
    )


def _finish(cli: RecipeCLI) -> None:
    module: AudioClassification = cli.model
    mel = LogMel(replace(module.mel, mean=0.0, std=1.0))
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
        LogMel(module.mel),
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
    return evaluate("validate", argv, make_cli)


def test(argv: list[str]) -> int:
    """`omnimix audio test`."""
    return evaluate("test", argv, make_cli)
