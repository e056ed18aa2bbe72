"""What the recipes that classify share: the steps, what is measured, and what a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ...backbones.serialization import to_dict
from ...errors import ConfigError
from ...modalities import save_model
from ...modalities.common.classifier import Classifier, pattern_name
from ...utils.console import emit, say
from ..compare import write_predictions
from .card import write_card
from .cli import RecipeCLI
from .media import IGNORED
from .optimisers import optimise
from .ranks import from_all_ranks
from .report import Panel, Row, Shown, confusion, curves, gallery, write_metrics, write_report
from .strategies import whole_model
from .training import AverageWeights, TrainingConfig, parts
from .watch import WatchLearning


@dataclass(frozen=True, kw_only=True)
class ClassificationTrainingConfig(TrainingConfig):
    """How the weights of a classifier are found; see `TrainingConfig` for the rest.

    Args:
        label_smoothing: the part of the target that is spread over all classes.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        parts(self, "label_smoothing")


class Classification(pl.LightningModule):
    """A classifier and how it is trained.

    Args:
        model: from inputs to logits.
        input_name: the name in a batch of what the model takes.
        training: optimiser, schedule, regularisation and averaging.
        classes: number of classes.
    """

    def __init__(self, model: Classifier, *, input_name: str, training: ClassificationTrainingConfig, classes: int):
        super().__init__()
        self.model, self.input_name, self.training_config = model, input_name, training
        self.classes = classes
        self.mixer = pattern_name(model.config.backbone)
        self.acc1 = MulticlassAccuracy(classes, top_k=1, average="micro", ignore_index=IGNORED)
        self.acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", ignore_index=IGNORED)
        # Lightning's own mean over ranks rounds the number of samples.
        self.loss = MeanMetric()

    def forward(self, inputs: Any) -> Tensor:
        return self.model(inputs)

    def varied(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """What a training step sees of a batch, inputs and targets; it may draw from the global generator."""
        return inputs, labels

    def named(self, batch: Any) -> Mapping[str, Any]:
        """A batch by names: as it is, or of a pair of inputs and labels, as data sets of others give them.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(batch, list | tuple) and len(batch) == 2:
            batch = {self.input_name: batch[0], "label": batch[1]}
        if not isinstance(batch, Mapping) or self.input_name not in batch or "label" not in batch:
            shown = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(f"a batch is {shown}; it must be a pair, or a dict with {self.input_name!r} and 'label'")
        return batch

    def training_step(self, batch: Any, index: int) -> Tensor:
        batch = self.named(batch)
        if bool((batch["label"] == IGNORED).all()):
            # In place of samples that cannot be read: nothing is learned, and every rank takes the step.
            return self.model(batch[self.input_name]).float().sum() * 0.0
        inputs, targets = self.varied(batch[self.input_name], batch["label"])
        logits, extra = self.model.forward_with_losses(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.training_config.label_smoothing)
        # The losses of routed experts are weighted already.
        loss = loss + sum(extra.values())
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(inputs), sync_dist=True
        )
        return loss

    def validation_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        return self.measure(batch, "val")

    def test_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        return self.measure(batch, "test")

    def measure(self, batch: Any, split: str) -> dict[str, Tensor]:
        """Count a held-out batch; logits (b, classes) and labels (b,)."""
        batch = self.named(batch)
        labels = batch["label"]
        logits = self(batch[self.input_name]).float()
        counted = int((labels != IGNORED).sum())
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / max(1, counted)
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        self.loss(loss, weight=counted)
        self.log(f"{split}/loss", self.loss, batch_size=counted)
        self.log(f"{split}/acc1", self.acc1, prog_bar=True, batch_size=counted)
        self.log(f"{split}/acc5", self.acc5, batch_size=counted)
        return {"logits": logits, "label": labels}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimise(self, self.training_config)

    def configure_callbacks(self) -> list[pl.Callback]:
        averaging = [AverageWeights(self.training_config.ema)] if self.training_config.ema else []
        return [*averaging, WatchLearning(self.classes)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model"] = to_dict(self.model.config)


class Predictions(pl.Callback):
    """Keeps what a validation or test pass predicted, and enough samples for a gallery, wrong ones first.

    Args:
        shown: samples to keep of either kind.
    """

    def __init__(self, shown: int):
        self.shown = shown
        # Right ones are kept evenly over the pass: data sets are often in the order of their classes.
        self._passed, self._stride = 0, 1
        self.labels: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.right: list[tuple[Tensor, int, int, float]] = []
        self.wrong: list[tuple[Tensor, int, int, float]] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Classification, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        probability, prediction = outputs["logits"].softmax(-1).max(-1)
        labels = outputs["label"].cpu()
        probability, prediction = probability.cpu(), prediction.cpu()
        counted = labels != IGNORED
        self.labels.append(labels[counted])
        self.predictions.append(prediction[counted])
        for i in counted.nonzero()[:, 0].tolist():
            self._keep((batch[module.input_name][i], int(labels[i]), int(prediction[i]), float(probability[i])))

    def _keep(self, sample: tuple[Tensor, int, int, float]) -> None:
        inputs, truth, said, probability = sample
        if truth != said:
            if len(self.wrong) < self.shown:
                self.wrong.append((inputs.cpu(), truth, said, probability))
            return
        if self._passed % self._stride == 0:
            self.right.append((inputs.cpu(), truth, said, probability))
        self._passed += 1
        if len(self.right) == 2 * self.shown:
            self.right, self._stride = self.right[::2], 2 * self._stride

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        parts = from_all_ranks(trainer, (self.labels, self.predictions))
        self.labels = [label for labels, _ in parts for label in labels]
        self.predictions = [prediction for _, predictions in parts for prediction in predictions]

    def confusion(self, classes: int) -> Tensor:
        """Counts, truth down, prediction across."""
        cells = torch.cat(self.labels) * classes + torch.cat(self.predictions)
        return torch.bincount(cells, minlength=classes * classes).view(classes, classes)

    def gallery(self, names: Sequence[str], picture: Callable[[Tensor], Tensor], most: int) -> list[Shown]:
        """At most so many samples, up to half of them wrong ones, as `picture` draws them."""
        wrong = self.wrong[: most // 2]
        room = most - len(wrong)
        count = min(room, len(self.right))
        right = [self.right[i * len(self.right) // count] for i in range(count)]
        return [
            Shown(image=picture(sample), truth=names[truth], prediction=names[said], probability=probability)
            for sample, truth, said, probability in [*wrong, *right]
        ]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a model that is denied something reaches on the same held-out samples.

    Args:
        name: what it sees, such as "one frame".
        acc1: its accuracy.
        seconds: that it took.
    """

    name: str
    acc1: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a recipe shows its samples.

    Args:
        noun: what they are, in the plural.
        picture: draws one, as an image (c, h, w) in 0..1.
        columns: in a row of the gallery.
        rows: of the gallery.
        height: of the gallery, inches.
    """

    noun: str
    picture: Callable[[Tensor], Tensor]
    columns: int = 12
    rows: int = 3
    height: float = 4.9


def finish(cli: RecipeCLI, look: Look, baseline: Callable[[RecipeCLI], Baseline | None] | None = None) -> None:
    """Measure the averaged weights once more, and write model, numbers and picture into the run's folder.

    Args:
        look: how the recipe shows its samples.
        baseline: trains a model for comparison, after the measurement; it may return None.
    """
    model, data, folder = cli.model, cli.datamodule, cli.folder
    seen = Predictions(shown=look.columns * look.rows)
    cli.trainer.callbacks.append(seen)
    measured = cli.measure()
    for unreadable in from_all_ranks(cli.trainer, dict(data.unreadable)):
        data.unreadable.update(unreadable)
    whole = whole_model(cli.trainer, model)
    if whole is None:
        return
    save_model(whole, folder.path, details={"preprocess": data.preprocess.to_dict()})
    metrics: dict[str, Any] = {
        **{name: round(value, 6) for name, value in measured.items()},
        "train_seconds": round(cli.history.seconds, 1),
        "seconds_per_epoch": round(cli.history.seconds / max(1, len(cli.history.rows)), 2),
        "epochs": len(cli.history.rows),
        **cli.about(),
        f"train_{look.noun}": len(data.train_set),
        f"val_{look.noun}": int(sum(map(len, seen.labels))),
        "unreadable": data.unreadable,
    }
    # On several devices the samples do not come in their order.
    if seen.labels and cli.trainer.world_size == 1:
        labels, said = torch.cat(seen.labels).tolist(), torch.cat(seen.predictions).tolist()
        write_predictions(folder, data.preprocess.classes, labels, said)
    # Before the comparison too: whatever ends that must not cost the run its numbers.
    write_metrics(folder.metrics, metrics)
    compared = baseline(cli) if baseline is not None and measured else None
    if compared is not None:
        metrics |= {"baseline": compared.name, "baseline/acc1": round(compared.acc1, 6)}
        metrics["baseline_seconds"] = round(compared.seconds, 1)
        write_metrics(folder.metrics, metrics)
    _picture(cli, seen, metrics, look)
    write_card(folder.path, cli.task, metrics, data, data.preprocess.classes)
    _say(cli, metrics, look)


def _picture(cli: RecipeCLI, seen: Predictions, metrics: dict[str, Any], look: Look) -> None:
    names, history = cli.datamodule.preprocess.classes, cli.history.rows
    validated = "val/acc1" in metrics
    counts = seen.confusion(len(names)) if validated else None
    total = metrics[f"val_{look.noun}"]
    title = f"{metrics['val/acc1']:.1%} of {total} held-out {look.noun} right" if validated else "not validated"
    if "baseline" in metrics:
        title += f"; with {metrics['baseline']}: {metrics['baseline/acc1']:.1%}"
    subtitle = (
        f"{metrics['configuration']} · mixer {metrics['mixer']} · {metrics['parameters']:,} parameters · "
        f"{metrics['epochs']} epochs in {metrics['train_seconds']:.0f} s · "
        f"{metrics[f'train_{look.noun}']} training {look.noun}"
    )
    accuracy = curves(
        history, {"top 1": "val/acc1", "top 5": "val/acc5"}, f"accuracy on held-out {look.noun}", percent=True
    )
    panels: list[Panel] = [curves(history, {"training": "train/loss", "held out": "val/loss"}, "loss"), accuracy]
    rows = [Row(panels=panels, height=4.6)]
    if counts is not None:
        panels.append(confusion(counts, names, f"confusion of held-out {look.noun}"))
        shown = seen.gallery(names, look.picture, look.columns * look.rows)
        wrong = total - int(counts.diagonal().sum())
        below = gallery(shown, f"held-out {look.noun}: {wrong} of {total} are wrong", look.columns)
        rows.append(Row(panels=[below], height=look.height))
    write_report(cli.folder.report, title, subtitle, rows)


def _say(cli: RecipeCLI, metrics: dict[str, Any], look: Look) -> None:
    folder = cli.folder
    row = {
        "run": folder.path.name,
        "mixer": metrics["mixer"],
        **{f"top {k}": f"{metrics[f'val/acc{k}']:.2%}" for k in (1, 5) if f"val/acc{k}" in metrics},
        **({f"with {metrics['baseline']}": f"{metrics['baseline/acc1']:.2%}"} if "baseline" in metrics else {}),
        "parameters": f"{metrics['parameters']:,}",
        "seconds": f"{metrics['train_seconds']:.0f}",
        "s / epoch": f"{metrics['seconds_per_epoch']:.2f}",
    }
    emit(f"on held-out {look.noun}", [row])
    for path, reason in sorted(cli.datamodule.unreadable.items()):
        say(f"skipped: {path} ({reason})")
    say(f"picture: {folder.report}    numbers: {folder.metrics}    model: {folder.weights}")
