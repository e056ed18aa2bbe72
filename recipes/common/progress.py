"""Lines of progress for logs and notebooks' output, where no bar can move."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ...utils.console import duration, say, short_number
from ...utils.log import EVERY
from .optimisers import planned_steps
from .private_lightning import accumulating


class ProgressLines(Callback):
    """Prints a line every ten seconds of training or validation: how far it is, how fast, and how long it still takes.

    The first process prints. The loss is the mean over the steps since the line before; samples and tokens are those
    of this process.

    Args:
        every: seconds from line to line.
    """

    def __init__(self, every: float = EVERY):
        self.every = every
        self._said = self._since = self._window = self._validating = 0.0
        self._started_at = self._planned = 0
        self._loss: float | torch.Tensor = 0.0
        self._batches = self._samples = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._said = self._since = time.monotonic()
        self._started_at, self._planned = trainer.global_step, planned_steps(trainer)
        self._clear()

    def _clear(self) -> None:
        self._loss, self._batches, self._samples = 0.0, 0, 0
        self._window = time.monotonic()

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and time.monotonic() - self._said >= self.every

    def _say(self, *parts: str) -> None:
        say("  ".join(part for part in parts if part))
        self._said = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss, count = outputs["loss"].detach(), outputs.get("count")
        if count is not None:
            loss = outputs["nats"].detach() / count
        self._loss = self._loss + loss
        self._batches += 1
        self._samples += int(count) if count is not None else pl_module.count(batch)
        if accumulating(trainer) or not self._due(trainer):
            return
        step, now = trainer.global_step, time.monotonic()
        left = (now - self._since) / max(1, step - self._started_at) * (self._planned - step)
        most = trainer.max_epochs
        self._say(
            f"step {step:,}/{self._planned:,}",
            f"epoch {trainer.current_epoch + 1}/{most}" if most is not None and most > 0 else "",
            f"loss {short_number(float(self._loss) / self._batches)}",
            f"lr {short_number(max(group['lr'] for group in trainer.optimizers[0].param_groups))}",
            f"{self._samples / max(now - self._window, 1e-9):,.1f} {'samples' if count is None else 'tokens'}/s",
            f"{duration(left)} left",
            _memory(pl_module.device),
        )
        self._clear()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = time.monotonic()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._due(trainer):
            total = sum(trainer.num_val_batches) if isinstance(trainer.num_val_batches, list) else 0
            self._say(f"validating: batch {batch_idx + 1:,}" + (f"/{total:,}" if 0 < total < float("inf") else ""))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What a validation takes is none of the speed of training.
        self._window += time.monotonic() - self._validating


def _memory(device: torch.device) -> str:
    """The most memory in use so far: of the device, or of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{most / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"
