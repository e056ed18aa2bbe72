"""The curves of a run, which are part of its checkpoint: a resumed run has them from the beginning."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ...utils.console import say, short_number
from .optimisers import planned_steps
from .private_lightning import accumulating


class History(Callback):
    """One row an epoch with what was logged, and the seconds that training took.

    Attributes:
        lines: whether to print each row of an epoch or a validation, for logs in which a progress bar cannot move.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, int | float]] = []
        self.seconds = 0.0
        self.lines = False
        self._since = 0.0

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def _add(self, trainer: pl.Trainer, head: str | None, **row: int | float) -> None:
        self._count()
        self.rows.append({"seconds": self.seconds, **row})
        if self.lines and head is not None and trainer.is_global_zero:
            measured = sorted((name, value) for name, value in row.items() if name not in ("epoch", "step"))
            say("  ".join([head, *(f"{name} {short_number(value)}" for name, value in measured)]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps if trainer.loggers else 0
        if every and not accumulating(trainer) and step % every == 0:
            rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
            for logger in trainer.loggers:
                logger.log_metrics({"lr": rate}, step=step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + 1
        self._add(trainer, f"epoch {epoch}/{trainer.max_epochs}", epoch=epoch, **logged)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.seconds = [dict(row) for row in state["rows"]], state["seconds"]


class StepHistory(History):
    """Rows over the optimiser's steps: the training loss each few of them, and what each validation measured.

    A training step returns, next to its loss, "nats" and "count" of all ranks; the loss in a row is their quotient over
    all batches since the row before, in nats per token. `tokens_per_second` is counted over the same batches, without
    the validations in between.

    Attributes:
        every: steps from row to row; the trainer's `log_every_n_steps`.
        tokens: scored so far, on all ranks.
        busy: seconds of training for these, without the validations in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.every = 1
        self.tokens = 0
        self.busy = 0.0
        self._nats: float | torch.Tensor = 0.0
        self._counted: int | torch.Tensor = 0
        self._passed = 0.0
        self._mark = 0.0
        self._planned = 0

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.every = max(1, trainer.log_every_n_steps)
        self._planned = planned_steps(trainer)
        self._mark = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._nats = self._nats + outputs["nats"].double()
        self._counted = self._counted + outputs["count"]
        if not accumulating(trainer) and trainer.global_step % self.every == 0:
            row = self._row(trainer)
            pl_module.log_dict({name: row[name] for name in ("tokens_per_second", "lr")}, batch_size=1)

    def _row(self, trainer: pl.Trainer) -> dict[str, float]:
        nats, counted = float(self._nats), int(self._counted)  # waits for the device, so that the clock is right
        self._passed += time.monotonic() - self._mark
        row = {
            "train/loss": nats / counted,
            "tokens_per_second": counted / max(self._passed, 1e-9),
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
        }
        self.tokens += counted
        self.busy += self._passed
        self._nats, self._counted, self._passed = 0.0, 0, 0.0
        self._add(trainer, None, step=trainer.global_step, **row)
        self._mark = time.monotonic()
        return row

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passed += time.monotonic() - self._mark

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        measured = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self._add(trainer, f"step {trainer.global_step}/{self._planned}", step=trainer.global_step, **measured)
        self._mark = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count()
        if self._counted and trainer.global_step >= self._planned:
            self._row(trainer)

    def state_dict(self) -> dict[str, Any]:
        partial = {"nats": float(self._nats), "counted": int(self._counted), "passed": self._passed}
        return super().state_dict() | partial | {"tokens": self.tokens, "busy": self.busy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._nats, self._counted, self._passed = state["nats"], state["counted"], state["passed"]
        self.tokens, self.busy = state["tokens"], state["busy"]
