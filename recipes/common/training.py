"""What every recipe trains with: options, averaged weights, resumable randomness, checkpoints, history."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from ...backbones.config import bounded, not_negative, positive
from ...errors import ConfigError, OmnimixError, UnknownName
from ...utils.devices import native_bf16
from ...utils.files import replace_file
from ...utils.private_torch import foreach_lerp_, foreach_mul_
from .freezing import freeze
from .loading import mix
from .private_lightning import accumulating, validates_now
from .ranks import Agreement, summed
from .strategies import load_whole, local, whole_as


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
        freeze: parameters that stay as they are, by their names: a module ("backbone", "backbone.blocks.0") with all of
            its own, or a pattern with * ("*.norm.*"); several are joined by
            commas. "backbone,tokenizer" trains the head alone.
        layer_decay: factor on the learning rate from each block to the one before it, so that the first layers change
            least (arXiv 2106.08254, appendix); 1 is none.
        ema: decay of the averaged weights, which are what is measured and saved; 0 is no averaging.
    """

    called: ClassVar[str] = "training"

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
    freeze: tuple[str, ...] | str = ()
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.freeze, str):
            object.__setattr__(self, "freeze", tuple(part.strip() for part in self.freeze.split(",") if part.strip()))
        for name, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
            if getattr(self, name) not in known:
                raise UnknownName(f"training.{name}", getattr(self, name), known)
        positive(self, "lr")
        parts(self, "min_lr", "warmup", "decay", "momentum", "ema")
        for name in ("momentum", "ema"):
            if getattr(self, name) == 1:
                raise ConfigError(f"training.{name} is 1.0; it must be below 1")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(
                f"training.warmup is {self.warmup} and training.decay is {self.decay}; together they are at most 1"
            )
        not_negative(self, "weight_decay")
        bounded(self, "layer_decay", above=0, most=1, wanted="above 0 and at most 1")


def parts(config: TrainingConfig, *names: str) -> None:
    """Raise ConfigError unless each named field lies in [0, 1]."""
    bounded(config, *names, least=0, most=1, wanted="in [0, 1]")


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


class EvenSteps(pl.LightningModule):
    """Base of modules in which every sample of an optimizer step has the same weight; in text a sample is a token.

    Lightning divides each loss by `trainer.accumulate_grad_batches` and averages over processes. The last window of an
    epoch may have fewer batches than that, and batches differ in their number of samples where some are unreadable.

    It freezes what `training_config.freeze` names. List it before the class whose `training_step` returns the mean
    loss of a batch, or call `weighted` in one's own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Samples of the batches since the last optimizer step, over all processes.
        self._window: list[Any] = []
        self._ranks, self._batches = 1, 1

    def setup(self, stage: str) -> None:
        # Before parallel strategies look at what is trained.
        training: TrainingConfig | None = getattr(self, "training_config", None)
        if training is not None:
            freeze(self, [*training.freeze])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning leaves the start of an epoch out where a run is resumed within one. A baseline trains alone, also
        # where the processes of the run are still connected.
        self._ranks, self._batches = self.trainer.world_size, self.trainer.accumulate_grad_batches

    def training_step(self, batch: Any, index: int) -> Any:
        loss: Any = super().training_step(batch, index)
        count = self.count(batch)
        total = summed(torch.tensor(float(count), device=loss.device))[0] if self._ranks > 1 else count
        return self.weighted(loss, count, total)

    def count(self, batch: Any) -> int:
        """How many samples the loss of a batch, by names or a pair of inputs and labels, is the mean of."""
        labels = batch[1] if isinstance(batch, list | tuple) else batch["label"]
        return int((labels >= 0).sum())

    def weighted(self, loss: Tensor, count: int, total: Tensor | float) -> Tensor:
        """The mean loss of a batch with the weight that the batch has in its step.

        Args:
            loss: the mean over the samples of this process.
            count: how many these are.
            total: and those of all processes; a tensor of the loss's device where there are several.
        """
        if self._ranks > 1:
            loss = loss * (count * self._ranks / _divisor(total))
        if self._batches > 1:
            self._window.append(total)
            loss = loss * (total / _divisor(self._window[0]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the mean of means that Lightning leaves into the mean over all samples of the window."""
        if self._window:
            factor = float(_divisor(self._window[0]) * self._batches / _divisor(sum(self._window)))
            foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], factor)
            self._window = []


def _divisor(count: Any) -> Any:
    """A number of samples, at least 1; of a tensor without waiting for its device."""
    return count.clamp_min(1.0) if isinstance(count, Tensor) else max(1.0, count)


class SeedEveryStep(Callback):
    """Seeds the global generator anew for every step, from (seed, step, rank).

    Dropout, stochastic depth and mixing then depend on the step alone: a resumed run draws what the uninterrupted one
    drew, whatever else used the generator in between.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(mix(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank))


class AverageWeights(Callback):
    """An exponential moving average of the weights that is validated, saved, and kept at the end.

    The first steps average over fewer weights, (1 + t) / (10 + t) of the past, so that the initial ones fade at once
    (as TensorFlow's ExponentialMovingAverage does with `num_updates`). Each process averages its own part of
    sharded weights. A checkpoint has the average as `state_dict` and what is trained as `current_model_state`.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: list[Tensor] | None = None
        self._updates, self._latest = 0, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.average = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        current = _parts(pl_module)
        if self.average is None:
            self.average = [p.clone() for p in current]
        # A checkpoint may have been loaded before the module went to its device.
        self.average = [a.to(p.device) for a, p in zip(self.average, current, strict=True)]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the weights as they are now into the average; the first are the average."""
        current, t = _parts(module), self._updates
        if self.average is None or t == 0:
            self.average = [p.clone() for p in current]
        else:
            foreach_lerp_(self.average, current, 1 - min(self.decay, (1 + t) / (10 + t)))
        self._updates += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._latest:
            self.update(pl_module)
            self._latest = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def _swap(self, module: nn.Module) -> None:
        assert self.average is not None
        for kept, current in zip(self.average, _parts(module), strict=True):
            former = kept.clone()
            kept.copy_(current)
            current.copy_(former)

    def adopt(self, module: nn.Module) -> None:
        """Give the module the averaged weights."""
        if self.average is not None:
            for kept, current in zip(self.average, _parts(module), strict=True):
                current.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "latest_update_step": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._latest = state_dict["updates"], state_dict["latest_update_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert self.average is not None
        parameters = list(pl_module.parameters())
        whole = [whole_as(kept, like) for kept, like in zip(self.average, parameters, strict=True)]
        if not trainer.is_global_zero:
            return
        averaged = {id(p): kept for p, kept in zip(parameters, whole, strict=True)}
        # Tied parameters have several names.
        names = dict(pl_module.named_parameters(remove_duplicate=False))
        current = checkpoint["state_dict"]
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = {n: averaged[id(names[n])] if n in names else current[n] for n in current}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The module has the average now.
        self.average = [p.clone() for p in _parts(pl_module)]
        if "current_model_state" in checkpoint:
            load_whole(pl_module, checkpoint["current_model_state"])


def _parts(module: nn.Module) -> list[Tensor]:
    return [local(p) for p in module.parameters()]


class Interrupted(OmnimixError):
    """Training was stopped from outside after its state had been saved."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C stays KeyboardInterrupt, of which Lightning makes an exit without a word."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


class Begin(pl.Callback):
    """Calls `begin` on the first process after the first step, when model, data and saved state have proved to fit.

    Args:
        begin: what a failure before must not have done.
    """

    def __init__(self, begin: Callable[[], None]):
        self.begin, self.done = begin, False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.done:
            self.done = True
            if trainer.is_global_zero:
                self.begin()


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, at each epoch's end and when the run is stopped.

    Ctrl-C and SIGTERM let the step finish, save, and end the run; a second Ctrl-C ends it at once. A step of several
    batches is whole before anything is saved, and so is a validation that follows it. It is enough to tell one
    process: all stop after the same step.

    Args:
        folder: where `last.ckpt` lies.
        every_n_steps: also within an epoch; 0 is only at its end.
    """

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int = 0):
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._asked = False
        self._agree = Agreement()
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree.start(trainer)
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may hear signals
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that Python has not installed and cannot name; the system's own stands in for it.
            self._handlers[number] = signal.signal(number, self._ask) or signal.SIG_DFL

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
        # Lightning resumes a state between a step and its validation without the validation.
        if not accumulating(trainer) and not validates_now(trainer):
            self._pause(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not accumulating(trainer):
            self._pause(trainer)

    def _pause(self, trainer: pl.Trainer) -> None:
        if self._agree(self._asked):
            self.save(trainer)
            raise Interrupted(f"stopped after step {trainer.global_step}; its state is in {self.path}")
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree.end()
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def save(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`; where that fails an older one stays, and nothing else does."""
        trainer.save_checkpoint(self.path)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all; an error names the file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # of a store that is no disk
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        # In memory first: of a full disk torch does not give the system's error.
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        replace_file(path, lambda part: part.write_bytes(whole.getbuffer()))
