"""What a fit would do: `--dry-run`."""

from __future__ import annotations

import math
from typing import Any

from ...utils.console import say


def steps_of(trainer: Any, batches: int) -> int:
    """The steps of the optimiser that a trainer makes with so many batches an epoch; -1 where nothing ends them."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else math.floor(batches * limit)
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
    found = [steps for steps in (by_epochs, trainer.max_steps) if steps >= 0]
    return min(found, default=-1)


def describe(cli: Any) -> None:
    """Print what the fit of a command line would do."""
    data, trainer, model = cli.datamodule, cli.trainer, cli.model
    data.setup("fit")
    batches = len(data.train_dataloader())
    steps = steps_of(trainer, batches)
    parameters = [(p.numel(), p.requires_grad) for p in model.model.parameters()]
    total, trained = sum(n for n, _ in parameters), sum(n for n, needed in parameters if needed)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    say(f"data: {type(data).__name__}, {batches:,} batches an epoch")
    say(f"model: {type(model.model).__name__}, mixer {model.mixer}, {total:,} parameters{frozen}")
    say(f"training: {'without end' if steps < 0 else f'{steps:,} steps'}, precision {trainer.precision}")
    say(f"run: {cli.folder.path}")
    say("nothing was trained or written (--dry-run)")
