"""Video understanding: `omnimix video fit`, `validate` and `test`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from ...backbones import BackboneConfig
from ...errors import ConfigError
from ...modalities.video.model import VideoClassifier, video_classifier
from ...utils.console import say
from ..common.classification import Baseline, Classification, ClassificationTrainingConfig, Look, finish
from ..common.cli import NOTHING, RecipeCLI, interruptible
from ..common.commands import evaluate, run_fit
from ..common.training import AverageWeights, EvenSteps, SeedEveryStep
from .data import VideoData, VideoFolderData
from .moving_digits import MovingDigitsData
from .preprocess import strip

RECIPE = "video_understanding"
__all__ = ["MovingDigitsData", "VideoFolderData", "VideoUnderstanding"]

_TRAINING = ClassificationTrainingConfig()
# Frames of a clip that the report shows.
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ClipTokens:
    """What becomes a token of a clip.

    Args:
        tubelet: its frames, and its pixels down and across, [t, h, w].
        group: tubelets in time, down and across whose mean becomes one token, [t, h, w]: for long videos.
        merge: tokens that are left of each time step, the others merged into those most like them (ToMe, arXiv
            2210.09461); null merges none.
    """

    tubelet: tuple[int, int, int] = (2, 8, 8)
    group: tuple[int, int, int] = (1, 1, 1)
    merge: int | None = None

    def of_one_frame(self) -> ClipTokens:
        """The same for clips of one frame."""
        return replace(self, tubelet=(1, *tuple(self.tubelet)[1:]), group=(1, *tuple(self.group)[1:]))


_TOKENS = ClipTokens()
_BACKBONE = BackboneConfig(dim=64, depth=2, pattern=("gla",), scan="temporal-first")


class VideoUnderstanding(EvenSteps, Classification):
    """A video classifier and how it is trained.

    Args:
        backbone: the configuration of the blocks; see `BackboneConfig`. Where `causal`, the scan "temporal-first"
            stands for "forward".
        tokens: what becomes a token.
        causal: use a causal model, which can stream films.
        training: optimiser, schedule, regularisation and averaging.
        one_frame_epochs: how many epochs to train a single-frame baseline, which sees one frame of each clip; null
            takes as many as the model, 0 trains none.
        clips: channels, frames, height and width of a clip, and the number of classes; set by the data.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig = _BACKBONE,
        tokens: ClipTokens = _TOKENS,
        causal: bool = False,
        training: ClassificationTrainingConfig = _TRAINING,
        one_frame_epochs: int | None = None,
        clips: tuple[int, int, int, int, int] = (1, 16, 32, 32, 11),
    ):
        if one_frame_epochs is not None and one_frame_epochs < 0:
            raise ConfigError(f"model.one_frame_epochs is {one_frame_epochs}; it must be at least 0, or null")
        channels, *size, classes = clips
        if causal and backbone.scan == _BACKBONE.scan:
            backbone = replace(backbone, scan="forward")
        config = video_classifier(
            backbone,
            classes=classes,
            size=tuple(size),
            tubelet=tuple(tokens.tubelet),
            group=tuple(tokens.group),
            merge=tokens.merge,
            channels=channels,
            # Positions beyond the length of the clips are untrained, and films are longer.
            time_positions="none" if causal else None,
            causal=causal,
        )
        model = VideoClassifier(config)
        # Nearly as large as the tubelets: from 0.02, a small data set needs many epochs to find out where things are.
        for table in (model.tokenizer.positions, model.tokenizer.time_positions):
            if table is not None:
                torch.nn.init.trunc_normal_(table, std=0.3)
        super().__init__(model, input_name="video", training=training, classes=classes)
        self.one_frame_epochs = one_frame_epochs
        self._options = {
            "backbone": backbone,
            "tokens": tokens.of_one_frame(),
            "causal": causal,
            "training": training,
            "clips": (channels, 1, *size[1:], classes),
        }

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of clips (b, c, t, h, w), or the mean of the logits of several views (b, v, c, t, h, w)."""
        if inputs.ndim == 5:
            return self.model(inputs)
        return self.model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]).mean(1)

    def of_one_frame(self) -> VideoUnderstanding:
        """A new model with the same options for clips of one frame."""
        return VideoUnderstanding(**self._options)


def fit(argv: list[str], objects: Mapping[str, Any] = NOTHING) -> int:
    """`omnimix video fit`."""
    return run_fit("video", argv, partial(make_cli, objects=objects), _finish)


# What the data says -> the argument of the model.
LINKS = [("clips", "clips")]


def make_cli(command: str, argv: list[str], objects: Mapping[str, Any] = NOTHING) -> RecipeCLI:
    """The command line of a subcommand; see `RecipeCLI`."""
    return RecipeCLI(
        command,
        model=VideoUnderstanding,
        data=VideoData,
        recipe=RECIPE,
        argv=argv,
        objects=objects,
        links=LINKS,
        monitor="val/acc1",
        mode="max",
    )


def _finish(cli: RecipeCLI) -> None:
    restore = cli.datamodule.preprocess.restore
    look = Look(noun="clips", picture=lambda clip: strip(restore(clip), _SHOWN), columns=4, rows=5, height=5.6)
    finish(cli, look, one_frame_baseline)


def one_frame_baseline(cli: RecipeCLI) -> Baseline | None:
    """Train the single-frame baseline: the same model on a random frame of each clip, evaluated on the middle one."""
    module: VideoUnderstanding = cli.model
    epochs = len(cli.history.rows) if module.one_frame_epochs is None else module.one_frame_epochs
    if not epochs:
        return None
    say(f"training the single-frame baseline, epochs: {epochs}")
    begun = time.monotonic()
    torch.manual_seed(cli.options.seed_everything)
    single = module.of_one_frame()
    data = cli.datamodule.single_frames()
    trainer: Any = pl.Trainer(
        accelerator=cli.trainer.strategy.root_device.type,
        devices=1,
        # Alone, also where this is one of several processes.
        plugins=LightningEnvironment(),
        max_epochs=epochs,
        limit_train_batches=cli.trainer.limit_train_batches,
        precision=cli.trainer.precision,
        gradient_clip_val=cli.trainer.gradient_clip_val,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeedEveryStep(cli.options.seed_everything)],
    )
    with warnings.catch_warnings():
        # The warning is for several processes, and this trainer has one.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        with interruptible():
            trainer.fit(single, datamodule=data)
    for callback in trainer.callbacks:
        if isinstance(callback, AverageWeights):
            callback.adopt(single)
    single.eval()
    # Not by a validation: its metrics are those of all processes, and the others take no part in this.
    right, seen = 0, 0
    with torch.inference_mode():
        for batch in data.val_dataloader():
            said = single(batch["video"].to(single.device)).argmax(-1).cpu()
            right, seen = right + int((said == batch["label"]).sum()), seen + len(said)
    return Baseline(name="one frame", acc1=right / max(1, seen), seconds=time.monotonic() - begun)


def validate(argv: list[str]) -> int:
    """`omnimix video validate`."""
    return evaluate("validate", argv, make_cli)


def test(argv: list[str]) -> int:
    """`omnimix video test`."""
    return evaluate("test", argv, make_cli)
