"""Warns of a training from which nothing will come, while there is time to stop it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ...utils.log import logger_of

logger = logger_of(__name__)
# Validations, and the fraction of the run, after which something should have been learned.
_PATIENCE, _FRACTION = 5, 0.3
# Accuracy is at chance where it is below this many times that of guessing.
_GUESSING = 1.2


class WatchLearning(Callback):
    """Warns once each where the validation loss never falls, and where the accuracy stays at that of guessing.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int):
        self.classes = classes
        self.losses: list[float] = []
        self.best = 0.0
        self.said: list[str] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if "val/loss" not in metrics or "val/acc1" not in metrics:
            return
        self.losses.append(float(metrics["val/loss"]))
        self.best = max(self.best, float(metrics["val/acc1"]))
        done = (trainer.current_epoch + 1) / max(1, trainer.max_epochs or 1)
        if len(self.losses) >= _PATIENCE and done >= _FRACTION:
            self._judge(trainer)

    def _judge(self, trainer: pl.Trainer) -> None:
        if not min(self.losses[1:]) < self.losses[0]:
            self._warn(
                trainer,
                "loss",
                f"the validation loss has not fallen below that of the first of {len(self.losses)} validations: a "
                "lower model.training.lr may help, and a look at the labels",
            )
        if self.best < _GUESSING / self.classes:
            self._warn(
                trainer,
                "accuracy",
                f"after {len(self.losses)} validations the accuracy is at most {self.best:.1%}, and guessing among "
                f"{self.classes} classes gives {1 / self.classes:.1%}: nothing has been learned yet; another "
                "model.training.lr may help, and a look at the labels",
            )

    def _warn(self, trainer: pl.Trainer, what: str, text: str) -> None:
        if what not in self.said:
            self.said.append(what)
            if trainer.is_global_zero:
                logger.warning("%s", text)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "best": self.best, "said": list(self.said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.best, self.said = list(state["losses"]), state["best"], list(state["said"])
