"""What Lightning and jsonargparse keep private and `recipes/common/private_*.py` use does what is expected of it; a
failure means that they have changed it, and that the file must follow."""

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from omnimix.recipes.common.private_jsonargparse import actions
from omnimix.recipes.common.private_lightning import DataParallelStrategy, OpenCLI, accumulating, validates_now


class Module(pl.LightningModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, index):
        return self.layer(batch).mean()

    def validation_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(5, 2))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(1, 2))


class Watching(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((accumulating(trainer), validates_now(trainer)))


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def test_lightning_says_whether_it_accumulates_and_validates():
    watching = Watching()
    # Two batches a step, the last one alone; a validation after every fourth batch.
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=2, val_check_interval=4, callbacks=[watching], **QUIET)
    trainer.fit(Module())
    assert [accumulates for accumulates, _ in watching.seen] == [True, False, True, False, False]
    assert [validates for _, validates in watching.seen] == [False, False, False, True, False]


def test_all_processes_are_data_parallel(monkeypatch):
    # Lightning's own puts what the strategy says into a mesh, which needs the processes.
    sizes = []

    def mesh(data: int, tensor: int, *rest):
        sizes.append((data, tensor))

    monkeypatch.setattr("lightning.pytorch.strategies.model_parallel._setup_device_mesh", mesh)
    monkeypatch.setattr(DataParallelStrategy, "_setup_distributed", lambda self: None)
    monkeypatch.setattr("lightning.pytorch.strategies.strategy.Strategy.setup_environment", lambda self: None)
    strategy = DataParallelStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    strategy._lightning_module = Module()
    strategy.setup_environment()
    assert sizes == [(6, 1)]


def test_the_command_line_makes_its_trainer_by_the_open_method():
    made = []

    class CLI(OpenCLI):
        def make_trainer(self, config, callbacks):
            made.append(config["max_epochs"])
            return super().make_trainer(config, callbacks)

    cli = CLI(Module, trainer_defaults=QUIET, save_config_callback=None, run=False, args=["--trainer.max_epochs=3"])
    assert made == [3] and cli.trainer.max_epochs == 3


def test_the_parsers_of_subcommands_are_found():
    class CLI(OpenCLI):
        def _run_subcommand(self, subcommand):
            pass

    cli = CLI(Module, trainer_defaults=QUIET, save_config_callback=None, args=["fit", "--model.width=3"])
    assert isinstance(cli, LightningCLI) and cli.parser_of("fit").get_default("model.width") == 2
    options = {option for action in actions(cli.parser) for option in action.option_strings}
    assert "--model.width" in options


@pytest.mark.parametrize("nested", [False, True])
def test_the_options_of_a_parser_and_its_subcommands_are_found(nested):
    parser, inner = ArgumentParser(), ArgumentParser()
    parser.add_argument("--outer")
    if nested:
        inner.add_argument("--inner")
        parser.add_subcommands().add_subcommand("go", inner)
    options = {option for action in actions(parser) for option in action.option_strings}
    assert options >= {"--outer"} and ("--inner" in options) == nested
