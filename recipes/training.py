"""What every recipe trains with: options, averaged weights, resumable randomness, checkpoints, history."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from torch import Tensor

from ..commands import native_bf16
from ..errors import ConfigError, OmnimixError, UnknownName
from .loading import mix

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the weights are found.

    Args:
        optimizer: "adamw", or "muon" for the matrices of hidden layers with AdamW for all else.
        lr: the peak of the learning rate.
        min_lr: where the schedule ends, as a part of `lr`.
        warmup: the part of all steps over which the rate rises from 0.
        schedule: what follows: "cosine", or "wsd", which holds the peak and falls at the end.
        decay: the part of all steps over which "wsd" falls.
        weight_decay: on matrices; parameters that declare so, vectors and scalars are left alone.
        betas: of AdamW.
        momentum: of Muon.
        ema: decay of the averaged weights, which are what is measured and saved; 0 is no averaging.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.01
    warmup: float = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    ema: float = 0.99

    def __post_init__(self) -> None:
        for name, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
            if getattr(self, name) not in known:
                raise UnknownName(f"training.{name}", getattr(self, name), known)
        if not self.lr > 0:
            raise ConfigError(f"training.lr is {self.lr}; it must be above 0")
        parts(self, "min_lr", "warmup", "decay", "momentum", "ema")
        for name in ("momentum", "ema"):
            if getattr(self, name) == 1:
                raise ConfigError(f"training.{name} is 1.0; it must be below 1")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(
                f"training.warmup is {self.warmup} and training.decay is {self.decay}; together they are at most 1"
            )
        not_negative(self, "weight_decay")


def parts(config: TrainingConfig, *names: str) -> None:
    """Raise ConfigError unless each named field lies in [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"training.{name} is {getattr(config, name)}; it must be a part between 0 and 1")


def not_negative(config: TrainingConfig, *names: str) -> None:
    """Raise ConfigError where a named field is below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(f"training.{name} is {getattr(config, name)}; it must be at least 0")


def from_all_ranks(trainer: pl.Trainer, value: T) -> list[T]:
    """`value` of every process that trains together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


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

    Ctrl-C and SIGTERM let the step finish, save, and end the run; a second Ctrl-C ends it at once. A step of several
    batches is whole before anything is saved, and so is a validation that follows it.

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
        loop = trainer.fit_loop
        # Of a state between a step and its validation Lightning resumes without the validation.
        if not loop._should_accumulate() and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._pause(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self._pause(trainer)

    def _pause(self, trainer: pl.Trainer) -> None:
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
