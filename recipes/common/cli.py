"""The command line of a recipe: Lightning's, in front of one folder a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ...backbones.serialization import to_dict
from ...errors import CheckpointError, ConfigError
from ...modalities import load_weights
from ...utils.console import say
from ...utils.files import replace_file
from ...utils.options import add_json, add_threads, set_threads
from ...utils.run_folder import RunFolder
from .arguments import argument, configurations, prepared
from .help import short_help
from .history import History
from .initial import Loaded, adopt_statistics, initialise, source_of, with_model_of
from .migration import migrated_files
from .options import RecipeData, options_argument
from .parser import Parser, of_a_package, own_error
from .places import with_data_set
from .plan import describe
from .private_lightning import OpenCLI, quiet
from .progress import ProgressLines
from .ranks import share_threads, trainer_of_torchrun
from .rules import Rule
from .stored import build_fitting, run_of, stored_config, stored_model, why_not_resumed
from .training import (
    AverageWeights,
    Begin,
    LastCheckpoint,
    SeedEveryStep,
    WholeFiles,
    interruptible,
    precision,
)
from .trees import EPILOG, build, epilog, tree_defaults

# No objects for the trainer.
NOTHING: Mapping[str, Any] = MappingProxyType({})
_OF_THE_CALL = ("overwrite", "resume", "ckpt_path", "weights_only", "json", "run", "dry_run")


class RecipeCLI(OpenCLI):
    """LightningCLI for one subcommand of one recipe, all of whose files lie in the folder of the run.

    Args:
        command: "fit", "validate" or "test".
        model: the LightningModule.
        data: the base class of the data modules; `--data NAME` chooses one of them.
        recipe: the configuration that holds the defaults.
        argv: what the user typed after the command.
        links: (attribute of the data, argument of the model) pairs that the user need not repeat.
        monitor: the metric by which `best.ckpt` is kept.
        mode: "max" where larger values of it are better, "min" where smaller ones are.
        history: keeps the curves.
        callbacks: more of the recipe's own, for a fit.
        objects: arguments of the trainer that no command line can hold, such as callbacks and loggers.
        rule: how options that are null follow from the data, in a fit.
    """

    model_class: type[pl.LightningModule]
    datamodule_class: type[RecipeData]
    # What Lightning's connectors add to it, its class does not declare.
    trainer: Any

    def __init__(
        self,
        command: str,
        *,
        model: type[pl.LightningModule],
        data: type[RecipeData],
        recipe: str,
        argv: list[str],
        links: list[tuple[str, str]],
        monitor: str,
        mode: Literal["min", "max"],
        history: History | None = None,
        callbacks: Sequence[pl.Callback] = (),
        objects: Mapping[str, Any] = NOTHING,
        rule: Rule | None = None,
    ):
        self.command, self.links, self.monitor, self.mode = command, links, monitor, mode
        self.history = history or History()
        self.callbacks, self.objects = callbacks, objects
        self.loaded: Loaded | None = None
        self.task = recipe.split("_")[0]
        # Whatever changes the current folder later, the run stays where it was started.
        self._started = os.getcwd()
        quiet()
        argv = short_help(argv, self.task, command)
        argv = with_data_set(argv, data, fresh=command == "fit" and "--resume" not in argv)
        run = run_of(command, argv, self.task)
        init = argument(argv, "--init", "") if command == "fit" and run is None else ""
        with contextlib.ExitStack() as files:
            if run is not None:
                argv = files.enter_context(stored_config(argv, run, data, fit=command == "fit"))
            if init:
                known = "tokenizer" in {field.name for field in dataclasses.fields(data.defaults)}
                argv = files.enter_context(with_model_of(argv, init, stored_model(source_of(init), data), known))
            argv, base, self.configuration = configurations(argv, recipe)
            with migrated_files(argv) as argv:
                rule = rule if command == "fit" else None
                argv, self._defaults, self.plan = prepared(argv, base, model, data, rule)
        try:
            self._start(model, data, argv)
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def _start(self, model: type[pl.LightningModule], data: type[RecipeData], argv: list[str]) -> None:
        """Parse with the recipe's defaults, and do what is typed."""
        super().__init__(
            model,
            data,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults={"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 10},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": f"omnimix {self.task}"},
            auto_configure_optimizers=False,
            args=[self.command, *argv],
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns of arguments of the process, which there always are.
        self.config = parser.parse_args(args)
        if self.options.configuration is None:
            self.options.configuration = self.configuration

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="seed of weights, order and augmentation")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        fitting = self.command == "fit"

        def shown(text: str) -> str:
            return text if fitting else argparse.SUPPRESS

        parser.add_argument("--name", default=self.task, help=shown("name of the run: its folder under --runs"))
        parser.add_argument("--runs", default="runs", help=shown("the folder that holds the runs"))
        parser.add_argument(
            "--checkpoint_steps", type=int, default=0, help=shown("save the state within an epoch too, every N steps")
        )
        # Kept in the run's own configuration, so that a resumed run still knows where it came from.
        parser.add_argument(
            "--configuration",
            type=str | None,
            default=None,
            help=shown("name in metrics.json; default: the file's"),
        )
        add_threads(parser, int | None)
        if fitting:
            parser.add_argument("--overwrite", action="store_true", help="delete an older run of this name first")
            parser.add_argument("--resume", action="store_true", help="resume the run from its last saved state")
            parser.add_argument("--dry_run", action="store_true", help="print the plan; train and write nothing")
            parser.add_argument(
                "--init", type=str | None, default=None, help="start with the weights of a run, a saved model or a file"
            )
        else:
            parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
            add_json(parser)
        parser.epilog = f"{EPILOG} {epilog(self.datamodule_class)}"
        parser.link_arguments("seed_everything", f"data.init_args.{options_argument(self.datamodule_class)}.seed")
        for group, values in self._defaults.items():
            plain = group != "data" and isinstance(values, dict)
            parser.set_defaults({f"{group}.{name}": v for name, v in values.items()} if plain else {group: values})
        for source, target in self.links:
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")

    @property
    def options(self) -> Any:
        return self.config[self.command]

    def before_instantiate_classes(self) -> None:
        self._build_trees()
        if self.options.threads is not None:
            set_threads(self.options.threads)
            # The processes that Lightning starts read it.
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        else:
            share_threads()
        if self.command == "fit":
            if self.options.trainer.default_root_dir is not None:
                wanted = self.options.trainer.default_root_dir
                raise ConfigError(f"trainer.default_root_dir is {wanted!r}; runs lie in the folder of --runs: use that")
            runs = os.path.join(self._started, self.options.runs)
            self.folder = RunFolder.named(runs, self.options.name)
            if rank_zero_only.rank == 0:  # the others start when the first has made the folder
                self.folder.check(overwrite=self.options.overwrite, resume=self.options.resume)
        else:
            self.folder = RunFolder.finished(self.options.run)
        if self.command != "fit" or self.options.resume:
            make = partial(build_fitting, self.folder, fit=self.command == "fit")
            self.parser.add_instantiator(make, self.model_class, prepend=True)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise own_error(error) or ConfigError(of_a_package(" ".join(str(error).split()))) from error

    def _build_trees(self) -> None:
        # Lightning keeps a dump of plain values, which it makes unless there is one; then the trees become what the
        # model takes.
        dumped = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="yaml")
        self.config_dump = yaml.safe_load(dumped)[self.command]
        model = self.options.model
        for name in tree_defaults(self.model_class):
            model[name] = build(name, model[name])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.options.trainer
        accelerator = config.accelerator
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        chosen: dict[str, Any] = {
            "default_root_dir": str(self.folder.path),
            "precision": precision(config.precision, accelerator, sum(p.numel() for p in self.model.parameters())),
        }
        chosen |= trainer_of_torchrun(config)
        chosen |= {name: value for name, value in self.objects.items() if name != "callbacks"}
        if config.logger is None and "logger" not in chosen:
            chosen["logger"] = self._loggers() if self.command == "fit" else False
        return super().instantiate_trainer(**chosen, **kwargs)

    def _loggers(self) -> list[Any]:
        # Each part of a resumed run has a version of its own, since CSVLogger would replace what the first part wrote.
        parts = len(list((self.folder.path / "logs").glob("version_*"))) if self.options.resume else 0
        place = {"save_dir": str(self.folder.path), "name": "logs", "version": parts}
        return [CSVLogger(**place), TensorBoardLogger(**place)]

    def make_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> pl.Trainer:
        given = config.get("callbacks") or []
        callbacks = [*callbacks, *self.objects.get("callbacks", ())]
        given = [*(given if isinstance(given, list) else [given]), *callbacks]
        theirs = any(isinstance(each, ProgressBar) for each in given)
        shown = sys.stdout.isatty() and config.get("enable_progress_bar") is not False
        ours: list[pl.Callback] = [RichProgressBar(leave=False)] if shown and not theirs else []
        if not (shown or theirs):
            config["enable_progress_bar"] = False
        if config.get("overfit_batches"):
            # Lightning would replace the sampler of a loader, which ours, that resumes anywhere, does not have.
            config |= dict.fromkeys(("limit_train_batches", "limit_val_batches"), config["overfit_batches"])
            config["overfit_batches"] = 0.0
            self.datamodule.shuffled = False
        if self.command == "fit":
            self.history.lines = not (ours or theirs)
            ours += [ProgressLines()] if self.history.lines else []
            self.begin = Begin(self._begin)
            ours += [SeedEveryStep(self.options.seed_everything), self.begin, self.history, *self.callbacks]
        # Lightning takes no callback that saves where nothing is to be saved.
        if self.command == "fit" and config.get("enable_checkpointing") is not False:
            ours += [
                ModelCheckpoint(
                    self.folder.checkpoints,
                    filename="best",
                    monitor=self.monitor,
                    mode=self.mode,
                    enable_version_counter=False,
                    # Within an epoch too, where it is validated there.
                    save_on_train_epoch_end=False,
                ),
                LastCheckpoint(self.folder.checkpoints, self.options.checkpoint_steps),
            ]
        config.setdefault("enable_checkpointing", None)
        trainer = super().make_trainer(config, [*callbacks, *ours])
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # and no plugin of the user's
            trainer.strategy.checkpoint_io = WholeFiles()
        return trainer

    def fit(self, model: pl.LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        folder = self.folder
        if rank_zero_only.rank == 0:
            self.plan.show()
        if self.options.dry_run:
            return describe(self) if rank_zero_only.rank == 0 else None
        if self.options.resume:
            ckpt_path = str(folder.last) if folder.last.is_file() else None
            if ckpt_path is None:
                say(f"no state was saved in {folder.checkpoints} yet: starting from the beginning")
        if self.options.init is not None and ckpt_path is None:
            self.loaded = initialise(model, self.datamodule, self.options.init)
        if rank_zero_only.rank == 0:
            folder.create(resume=self.options.resume)
            if not self.options.resume:
                self._save_config()
        try:
            with interruptible():
                self.trainer.fit(model, ckpt_path=ckpt_path, **{**kwargs, "weights_only": True})
            if ckpt_path is not None and not self.begin.done:
                self._nothing_left(ckpt_path)
        except BaseException as error:
            if rank_zero_only.rank == 0 and not self.begin.done:
                if folder.restore():
                    say(f"stopped before the first step; the run {str(folder.path)!r} is as it was")
                    if isinstance(error, KeyboardInterrupt):
                        raise SystemExit(130) from error  # there is nothing of this run to resume
                elif isinstance(error, Exception) and not self.options.resume:
                    folder.discard()
            self._explain(error, ckpt_path)
            raise
        if rank_zero_only.rank == 0:
            # Begin hears of steps only, and a run of none replaces the older one too.
            folder.commit()

    def _nothing_left(self, ckpt_path: str) -> None:
        """Say, or raise where a state of another run was named, that no steps of a state are left."""
        done = f"has made all its {self.trainer.global_step} steps; more of them need a larger --trainer.max_epochs"
        if not self.options.resume:
            raise ConfigError(f"ckpt_path is {ckpt_path!r}, which {done}. To start with its weights take --init")
        say(f"the run {str(self.folder.path)!r} {done} (or max_steps), with --resume")

    @staticmethod
    def _explain(error: BaseException, ckpt_path: str | None) -> None:
        """Raise an error of ours where the state that was to be resumed is the cause."""
        if not isinstance(error, RuntimeError | EOFError | pickle.UnpicklingError):
            return
        reason = None if ckpt_path is None else why_not_resumed(error)
        if reason is not None:
            raise CheckpointError(f"cannot resume from {ckpt_path!r}: {reason}") from error

    def validate(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        self._load(model)
        self.measured = self.trainer.validate(model, datamodule=datamodule, verbose=False)

    def test(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        self._load(model)
        self.measured = self.trainer.test(model, datamodule=datamodule, verbose=False)

    def measure(self) -> dict[str, float]:
        """What a validation of the trained model says, with its averaged weights where there are any.

        Nothing where validation is switched off (`trainer.limit_val_batches` 0).
        """
        for callback in self.trainer.callbacks:
            if isinstance(callback, AverageWeights):
                callback.adopt(self.model)
        found = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return dict(found[0]) if found else {}

    def about(self) -> dict[str, Any]:
        """What the numbers of every recipe's run say of how they came about."""
        return {
            "parameters": sum(p.numel() for p in self.model.model.parameters()),
            "configuration": self.options.configuration,
            "mixer": self.model.mixer,
            "seed": self.options.seed_everything,
            "precision": self.trainer.precision,
            "threads": torch.get_num_threads(),
            **({} if self.loaded is None else {"init": str(self.loaded)}),
        }

    def _load(self, module: Any) -> None:
        load_weights(module.model, self.folder.weights)
        adopt_statistics(self.folder.path, self.datamodule)

    def _begin(self) -> None:
        """After the first step the configuration has proved to work: it replaces that of the run so far."""
        self.folder.commit()
        if self.options.resume:
            self._save_config()

    def _save_config(self) -> None:
        config = self.options.clone()
        for name in _OF_THE_CALL:
            config.pop(name, None)
        for name in tree_defaults(self.model_class):
            config.model[name] = to_dict(config.model[name])
        parser = self.parser_of(self.command)
        options: dict[str, Any] = {"skip_unset": False, "skip_validation": True, "overwrite": True, "multifile": False}
        # In one step: when a run is resumed, other processes read the file at this very time.
        replace_file(self.folder.config, lambda path: parser.save(config, str(path), **options))
