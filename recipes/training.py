"""What every recipe trains with: optimiser, schedule, averaged weights, resumable randomness, checkpoints, history."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from torch import Tensor, nn

from ..backbones.channel import rebalance
from ..backbones.parameters import no_weight_decay
from ..commands import native_bf16
from ..errors import ConfigError, OmnimixError
from .loading import mix

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the weights are found.

    Args:
        lr: the peak of the learning rate.
        min_lr: where the cosine ends, as a part of `lr`.
        warmup: the part of all steps over which the rate rises from 0.
        weight_decay: of AdamW, on matrices; parameters that declare so, vectors and scalars are left alone.
        betas: of AdamW.
        label_smoothing: the part of the target that is spread over all classes.
        mixup: strength (alpha) of mixing pairs of samples; 0 is never.
        cutmix: strength (alpha) of pasting one sample into another; 0 is never.
        mix_probability: the part of the steps that mix at all.
        ema: decay of the averaged weights, which are what is measured and saved; 0 is no averaging.
    """

    lr: float = 1e-3
    min_lr: float = 0.01
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 0.5
    ema: float = 0.99

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"training.lr is {self.lr}; it must be above 0")
        for name in ("min_lr", "warmup", "label_smoothing", "mix_probability", "ema"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "ema" and value == 1):
                raise ConfigError(f"training.{name} is {value}; it must be a part between 0 and 1")
        for name in ("weight_decay", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 0")


def from_all_ranks(trainer: pl.Trainer, value: T) -> list[T]:
    """`value` of every process that trains together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: those that decay, and those that declare that they must not."""
    spared = no_weight_decay(module)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in spared], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def cosine(step: int, total: int, warmup: float, floor: float) -> float:
    """The factor on the learning rate at `step` of `total`: a linear rise, then half a cosine down to `floor`."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))


def planned_steps(trainer: pl.Trainer) -> int:
    """The optimiser's steps in the whole run.

    `trainer.estimated_stepping_batches` would build the loop's loader before its state is restored, and Lightning
    then leaves the state out: a run resumed within an epoch would begin the epoch anew.

    Raises:
        ConfigError: a run without an end, for which there is no schedule.
    """
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        most = min(most, math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    if most == math.inf:
        raise ConfigError("trainer.max_epochs is -1; the learning rate's schedule needs an end (or trainer.max_steps)")
    return int(most)


def adamw(module: pl.LightningModule, config: TrainingConfig) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW, and a cosine with warm-up that moves every step."""
    total = planned_steps(module.trainer)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), lr=config.lr, betas=config.betas, foreach=True
    )
    optimizer.register_step_post_hook(lambda *_: rebalance(module))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, total, config.warmup, config.min_lr)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def precision(wanted: str | None, accelerator: str, parameters: int) -> str:
    """`wanted`, or for None what trains faster: bf16 autocast on GPUs, and on CPUs that have bf16 products.

    Small models stay in float32 on a CPU: there the casts take what the products save (measured with gla and
    attention: no gain at width 64, 1.4 x at width 192).
    """
    if wanted is not None:
        return wanted
    if accelerator == "cpu" and not (native_bf16() and parameters >= 1_000_000):
        return "32-true"
    return "bf16-mixed"


class SeedEveryStep(Callback):
    """Seeds the global generator anew for every step, from (seed, step, rank).

    Dropout, stochastic depth and mixing then depend on the step alone: a resumed run draws what the uninterrupted one
    drew, whatever else used the generator in between.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(mix(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank))


class AverageWeights(WeightAveraging):
    """An exponential moving average of the weights that is validated, saved, and kept at the end.

    The first steps average over fewer weights, (1 + t) / (10 + t) of the past, so that the initial ones fade at once
    (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
    """

    def __init__(self, decay: float):
        @torch.no_grad()
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            t = int(updates)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + t) / (10 + t)))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def adopt(self, module: pl.LightningModule) -> None:
        """Give the module the averaged weights, if there are any; a fit with nothing left to do has not done it."""
        if self._average_model is not None:
            self._copy_average_to_current(module)


class Interrupted(OmnimixError):
    """Training was stopped from outside after its state had been saved."""


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` complete: written beside it and then renamed, at each epoch's end and when the run is stopped.

    Ctrl-C and SIGTERM let the step finish, save, and end the run; a second Ctrl-C ends it at once.

    Args:
        folder: where `last.ckpt` lies.
        every_n_steps: also within an epoch; 0 is only at its end.
    """

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int = 0):
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._asked = False
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may hear signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._restore_handlers()
            raise KeyboardInterrupt
        self._asked = True

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._asked:
            self.save(trainer)
            raise Interrupted(f"stopped after step {trainer.global_step}; its state is in {self.path}")
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def save(self, trainer: pl.Trainer) -> None:
        beside = self.path.with_suffix(".part")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, self.path)


class History(Callback):
    """The curves of a run: one row an epoch with what was logged, and the seconds that training took.

    Both are part of the checkpoint, so a resumed run has them from its first epoch on.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, int | float]] = []
        self.seconds = 0.0
        self._since = 0.0

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count()
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch + 1, "seconds": self.seconds, **logged})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.seconds = [dict(row) for row in state["rows"]], state["seconds"]
