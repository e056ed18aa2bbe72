"""The commands of a recipe around its command line: what is said where they are stopped, and what they print."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_only

from ...errors import ConfigError
from ...utils.console import emit, say
from ...utils.run_folder import RunFolder
from .arguments import argument
from .cli import RecipeCLI
from .ranks import losses_named, same_again
from .training import Interrupted


def run_fit(
    task: str,
    argv: list[str],
    make: Callable[[str, list[str]], RecipeCLI],
    finish: Callable[[RecipeCLI], None],
) -> int:
    """Train, and then `finish`; or, where it is stopped from outside, say how to resume.

    Args:
        task: the command is `omnimix TASK fit`, and the run's name, unless it is given another, TASK.
        make: parses and trains, from "fit" and the command line.
    """
    name, runs = argument(argv, "--name", task), argument(argv, "--runs", "runs")
    folder = RunFolder.named(runs, name)
    place = "" if runs == "runs" else f" --runs {shlex.quote(runs)}"
    again = f"{same_again(f'omnimix {task} fit')} --name {name}{place} --resume"
    cli = None
    try:
        with losses_named(f"; resume with: {again}"):
            cli = make("fit", argv)
            if "--dry_run" in argv:
                return 0
            finish(cli)
    except (Interrupted, KeyboardInterrupt) as stop:
        if rank_zero_only.rank != 0:
            return 0  # a failure of theirs would make whoever started them stop the first before it has spoken
        if not folder.config.is_file():
            raise
        done = "stopped" if cli is None else "stopped after the training, before the report was done"
        say(f"\n{str(stop) or done}", keep="\n")
        say(f"resume with: {again}")
        return 130
    return 0


def evaluate(command: str, argv: list[str], make: Callable[[str, list[str]], RecipeCLI]) -> int:
    """Evaluate the run that `--run` names with its own configuration, and print the metrics."""
    run = argument(argv, "--run", "")
    with losses_named():
        cli = make(command, argv)
    if not cli.measured:
        split = "val" if command == "validate" else "test"
        raise ConfigError(
            f"trainer.limit_{split}_batches is 0, so nothing is evaluated; add --trainer.limit_{split}_batches 1.0"
        )
    row = {"run": str(cli.folder.path), **{name: float(value) for name, value in cli.measured[0].items()}}
    if cli.trainer.is_global_zero:
        emit(f"{command} {run}", [row], cli.options.json)
    return 0
