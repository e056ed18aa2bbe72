"""What the recipes use of Lightning that Lightning keeps private; no other file does.

`tests/recipes/test_private.py` says when a release of Lightning changes one of them.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

# By which Lightning says things of itself.
LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning")


class DataParallelStrategy(ModelParallelStrategy):
    """A mesh of processes, all of which are data-parallel; Lightning's default is tensor-parallel within a machine."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        # The constructor takes their number too, but does not know it yet.
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()


class OpenCLI(LightningCLI):
    """LightningCLI with public names for what subclasses change and ask."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        return self.make_trainer(config, callbacks)

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        """The trainer of these options, with callbacks in addition to those that they name."""
        return super()._instantiate_trainer(config, callbacks)

    def parser_of(self, command: str) -> LightningArgumentParser:
        """The parser of a subcommand."""
        return self._parser(command)


def accumulating(trainer: pl.Trainer) -> bool:
    """Whether the step of the batch that has just been seen waits for further batches."""
    return trainer.fit_loop._should_accumulate()


def validates_now(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that has just been seen."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def quiet() -> None:
    """Leave out what Lightning says of itself; warnings about the run stay."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # What we do on purpose: a run is resumed in its folder, and small sets have short epochs.
    expected = ("Checkpoint directory .* not empty", "The number of training batches", r"Found \d+ module\(s\) in eval")
    for message in ("`isinstance.*LeafSpec", *expected):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
