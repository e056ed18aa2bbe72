"""Image classification: `omnimix vision fit`, `validate` and `test`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from ..backbones.config import MixerConfig, to_dict
from ..console import emit
from ..modalities import ImageClassifier, save_model
from ..modalities.vision import image_classifier
from .cli import RecipeCLI, evaluate, run_fit
from .data import DigitsData, ImageData, TensorData
from .folders import ImageFolderData
from .optimisers import optimise
from .preprocess import Preprocess
from .report import Row, Shown, confusion, curves, gallery, write_metrics, write_report
from .training import AverageWeights, TrainingConfig, from_all_ranks, not_negative, parts

RECIPE = "vision_classification"
__all__ = ["DigitsData", "ImageFolderData", "TensorData", "VisionClassification"]


@dataclass(frozen=True, kw_only=True)
class VisionTrainingConfig(TrainingConfig):
    """How the weights of an image classifier are found; see `TrainingConfig` for the rest.

    Args:
        label_smoothing: the part of the target that is spread over all classes.
        mixup: strength (alpha) of mixing pairs of samples; 0 is never.
        cutmix: strength (alpha) of pasting one sample into another; 0 is never.
        mix_probability: the part of the steps that mix at all.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        parts(self, "label_smoothing", "mix_probability")
        not_negative(self, "mixup", "cutmix")


class VisionClassification(pl.LightningModule):
    """An image classifier and how it is trained.

    Args:
        mixer: the sequence mixer, by name; several, joined by commas, are tiled over the depth ("gla,gla,attention"),
            and joined by "+" they run in parallel ("attention+gla").
        dim: width of the tokens.
        depth: number of blocks.
        patch: side of a patch in pixels; null gives 8 to 15 patches along a side, and small images fewer.
        scan: the orders in which mixers that only look backwards run over the patches.
        channel: the other half of a block: "swiglu", "mlp", "moe" or null.
        mixers: options by mixer name.
        drop_path: stochastic depth in the last block.
        training: optimiser, schedule, regularisation and averaging.
        classes: number of classes; the data says it.
        in_channels: 1 or 3; the data says it.
        image_size: side of the images; the data says it.
    """

    def __init__(
        self,
        *,
        mixer: str = "gla",
        dim: int = 64,
        depth: int = 4,
        patch: int | None = None,
        scan: str = "both",
        channel: str | None = "swiglu",
        mixers: dict[str, MixerConfig] = {},  # noqa: B006 - jsonargparse cannot write a factory's value
        drop_path: float = 0.0,
        training: VisionTrainingConfig = VisionTrainingConfig(),
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
    ):
        super().__init__()
        plain = image_classifier(
            mixer=mixer,
            dim=dim,
            depth=depth,
            classes=classes,
            size=image_size,
            patch=patch_for(image_size) if patch is None else patch,
            channels=in_channels,
            drop_path=drop_path,
        )
        options = plain.backbone.mixers | mixers
        backbone = replace(plain.backbone, scan=scan, channel=channel, mixers=options)
        self.mixer, self.training_config = mixer, training
        self.model = ImageClassifier(replace(plain, backbone=backbone))
        # As large as the patches: starting at 0.02, a small data set needs many epochs to find out where things are.
        torch.nn.init.trunc_normal_(self.model.tokenizer.positions, std=1.0)
        self.acc1 = MulticlassAccuracy(classes, top_k=1, average="micro")
        self.acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self._mixing = mixing(training, classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.model(images)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        images, targets = batch["image"], batch["label"]
        if self._mixing is not None:
            images, targets = self._mixing(images, targets)
        logits, extra = self.model.forward_with_losses(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.training_config.label_smoothing)
        # Of routed experts; weighted already.
        loss = loss + sum(extra.values())
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        return self._measure(batch, "val")

    def test_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        return self._measure(batch, "test")

    def _measure(self, batch: dict[str, Any], split: str) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        logits = self(images).float()
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), batch_size=len(images), sync_dist=True)
        self.log(f"{split}/acc1", self.acc1, prog_bar=True, batch_size=len(images))
        self.log(f"{split}/acc5", self.acc5, batch_size=len(images))
        return {"logits": logits, "label": labels}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimise(self, self.training_config)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [AverageWeights(self.training_config.ema)] if self.training_config.ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model"] = to_dict(self.model.config)


def patch_for(size: int) -> int:
    """The power of two, at least 2, that gives 8 to 15 patches along a side; fewer where the image is small."""
    patch = 2
    while size // (2 * patch) >= 8:
        patch *= 2
    return patch


def mixing(training: VisionTrainingConfig, classes: int) -> Any:
    """Mixup and CutMix of torchvision as configured, or None; they draw from the global generator."""
    from torchvision.transforms import v2

    ways: list[Any] = []
    if training.mixup > 0:
        ways.append(v2.MixUp(alpha=training.mixup, num_classes=classes))
    if training.cutmix > 0:
        ways.append(v2.CutMix(alpha=training.cutmix, num_classes=classes))
    if not ways:
        return None
    share = training.mix_probability
    return v2.RandomChoice([*ways, v2.Identity()], p=[*(share / len(ways) for _ in ways), 1 - share])


class Predictions(pl.Callback):
    """Keeps what a validation or test pass predicted, and enough images for a gallery, wrong ones first.

    Args:
        shown: images to keep.
    """

    def __init__(self, shown: int):
        self.shown = shown
        self.labels: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.right: list[tuple[Tensor, int, int, float]] = []
        self.wrong: list[tuple[Tensor, int, int, float]] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        probability, prediction = outputs["logits"].softmax(-1).max(-1)
        labels = outputs["label"].cpu()
        probability, prediction = probability.cpu(), prediction.cpu()
        self.labels.append(labels)
        self.predictions.append(prediction)
        for i, (truth, said) in enumerate(zip(labels.tolist(), prediction.tolist(), strict=True)):
            kept = self.right if truth == said else self.wrong
            if len(kept) < self.shown:
                kept.append((batch["image"][i].cpu(), truth, said, float(probability[i])))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        parts = from_all_ranks(trainer, (self.labels, self.predictions))
        self.labels = [label for labels, _ in parts for label in labels]
        self.predictions = [prediction for _, predictions in parts for prediction in predictions]

    def confusion(self, classes: int) -> Tensor:
        """Counts, truth down, prediction across."""
        cells = torch.cat(self.labels) * classes + torch.cat(self.predictions)
        return torch.bincount(cells, minlength=classes * classes).view(classes, classes)

    def gallery(self, preprocess: Preprocess) -> list[Shown]:
        wrong = self.wrong[: self.shown // 2]
        # Evenly over the pass: data sets are often in the order of their classes.
        room = self.shown - len(wrong)
        step = max(1, len(self.right) // room)
        names = preprocess.classes
        return [
            Shown(image=preprocess.restore(image), truth=names[truth], prediction=names[said], probability=probability)
            for image, truth, said, probability in [*wrong, *self.right[::step][:room]]
        ]


def fit(argv: list[str]) -> int:
    """`omnimix vision fit`."""
    return run_fit("omnimix vision fit", argv, _cli, _finish)


def _cli(command: str, argv: list[str]) -> RecipeCLI:
    return RecipeCLI(
        command,
        model=VisionClassification,
        data=ImageData,
        recipe=RECIPE,
        argv=argv,
        links=[("classes", "classes"), ("in_channels", "in_channels"), ("image_size", "image_size")],
        monitor="val/acc1",
        mode="max",
    )


def _finish(cli: RecipeCLI) -> None:
    """Measure the averaged weights once more, and write model, numbers and picture into the run's folder."""
    model, data, folder = cli.model, cli.datamodule, cli.folder
    seen = Predictions(shown=36)
    cli.trainer.callbacks.append(seen)
    measured = cli.measure()
    for unreadable in from_all_ranks(cli.trainer, dict(data.unreadable)):
        data.unreadable.update(unreadable)
    if not cli.trainer.is_global_zero:
        return
    save_model(model.model, folder.path, details={"preprocess": data.preprocess.to_dict()})
    metrics = {
        **{name: round(value, 6) for name, value in measured.items()},
        "train_seconds": round(cli.history.seconds, 1),
        "seconds_per_epoch": round(cli.history.seconds / max(1, len(cli.history.rows)), 2),
        "epochs": len(cli.history.rows),
        **cli.about(),
        "train_images": len(data.train_set),
        "val_images": int(sum(map(len, seen.labels))),
        "unreadable": data.unreadable,
    }
    write_metrics(folder.metrics, metrics)
    _picture(cli, seen, metrics)
    _say(cli, metrics)


def _picture(cli: RecipeCLI, seen: Predictions, metrics: dict[str, Any]) -> None:
    preprocess, history = cli.datamodule.preprocess, cli.history.rows
    counts = seen.confusion(len(preprocess.classes))
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    shown = seen.gallery(preprocess)
    title = f"{metrics['val/acc1']:.1%} of {total} held-out images right"
    subtitle = (
        f"{metrics['configuration']} · mixer {metrics['mixer']} · {metrics['parameters']:,} parameters · "
        f"{metrics['epochs']} epochs in {metrics['train_seconds']:.0f} s · {metrics['train_images']} training images"
    )
    rows = [
        Row(
            panels=[
                curves(history, {"training, augmented": "train/loss", "held out": "val/loss"}, "loss"),
                curves(
                    history, {"top 1": "val/acc1", "top 5": "val/acc5"}, "accuracy on held-out images", percent=True
                ),
                confusion(counts, preprocess.classes),
            ],
            height=4.6,
        ),
        Row(panels=[gallery(shown, f"held-out images: {total - right} of {total} are wrong")], height=4.9),
    ]
    write_report(cli.folder.report, title, subtitle, rows)


def _say(cli: RecipeCLI, metrics: dict[str, Any]) -> None:
    folder = cli.folder
    row = {
        "run": folder.path.name,
        "mixer": metrics["mixer"],
        "top 1": f"{metrics['val/acc1']:.2%}",
        "top 5": f"{metrics['val/acc5']:.2%}",
        "parameters": f"{metrics['parameters']:,}",
        "seconds": f"{metrics['train_seconds']:.0f}",
        "s / epoch": f"{metrics['seconds_per_epoch']:.2f}",
    }
    emit("on held-out images", [row])
    for path, reason in sorted(cli.datamodule.unreadable.items()):
        print(f"skipped: {path} ({reason})")
    print(f"picture: {folder.report}    numbers: {folder.metrics}    model: {folder.path / 'model.safetensors'}")


def validate(argv: list[str]) -> int:
    """`omnimix vision validate`."""
    return evaluate("validate", argv, _cli)


def test(argv: list[str]) -> int:
    """`omnimix vision test`."""
    return evaluate("test", argv, _cli)
