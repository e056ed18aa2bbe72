"""Runs that 0.1 has left are validated and resumed as 0.1 did it; see tests/data/v01/README.md."""

import importlib
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from omnimix.__main__ import main
from omnimix.recipes.common.migration import MODULES, migrate, migrated_files
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.recipes.vision.recipe import VisionClassification

V01 = Path(__file__).parents[1] / "data" / "v01"
MODULES_OF = {"vision": VisionClassification, "text": TextGeneration}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the runs of 0.1 and their text."""
    for name in ("runs", "text"):
        shutil.copytree(V01 / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # Lightning tells a strategy's processes of each other by variables that would outlive it.
    with mock.patch.dict(os.environ):
        yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", MODULES_OF)
def test_a_run_is_validated(place, kind):
    assert main([kind, "validate", "--run", f"runs/{kind}", "--json", "found.json"]) == 0
    [found] = json.loads(Path("found.json").read_text())
    stored = json.loads(Path(f"runs/{kind}/metrics.json").read_text())
    measured = {name: value for name, value in stored.items() if name.startswith("val/")}
    assert measured and {name: found[name] for name in measured} == pytest.approx(measured, abs=1e-5)


@pytest.mark.parametrize("more", [(), ("--trainer.strategy=fsdp2", "--trainer.devices=1")], ids=["alone", "fsdp2"])
@pytest.mark.parametrize("kind", MODULES_OF)
def test_a_run_is_resumed(place, kind, more, monkeypatch):
    stored = json.loads(Path(f"runs/{kind}/losses.json").read_text())["losses"]
    losses, step = [], MODULES_OF[kind].training_step

    def counted(self, batch, index):
        found = step(self, batch, index)
        losses.append(float((found["loss"] if isinstance(found, dict) else found).detach()))
        return found

    monkeypatch.setattr(MODULES_OF[kind], "training_step", counted)
    assert main([kind, "fit", "--name", kind, "--resume", *more]) == 0
    assert losses == pytest.approx(stored, abs=1e-5)
    # The run is stored in today's terms now.
    content = yaml.safe_load(Path(f"runs/{kind}/config.yaml").read_text())
    assert content == migrate(content)


@pytest.mark.parametrize("module", MODULES.values())
def test_what_a_class_path_becomes_is_there(module):
    assert importlib.import_module(module)


def test_only_files_that_need_it_are_replaced(tmp_path):
    old, new, broken = (tmp_path / name for name in ("old.yaml", "new.yaml", "broken.yaml"))
    values = {"data": {"class_path": "omnimix.recipes.data.DigitsData"}, "model": {"mixers": [{"class_path": "gla"}]}}
    old.write_text(yaml.safe_dump(values))
    new.write_text("data: DigitsData\n")
    broken.write_text("data: [")
    argv = ["--config", str(old), "--config", str(new), "--config", str(broken), "--seed_everything", "3"]
    with migrated_files(argv) as found:
        assert found[:1] + found[2:] == argv[:1] + argv[2:]
        content = yaml.safe_load(Path(found[1]).read_text())
        assert content == values | {"data": {"class_path": "omnimix.recipes.vision.data.DigitsData"}}


def test_options_of_0_1_have_today_s_names():
    old = {
        "mixer": "gla,attention+mamba2",
        "mixers": {"mamba2": {"class_path": "x.Mamba2Config", "init_args": {"expand": 3}}, "kda": {"heads": 2}},
        "channel": "moe",
        "channels": {"moe": {"class_path": "x.MoEConfig", "init_args": {"experts": 16}}, "mlp": {"ratio": 2.0}},
        "objective": "masked",
        "objectives": {"masked": {"eps": 0.1}},
    }
    new = migrate({"model": old})["model"]
    assert new["ffn"] == {"type": "moe", "experts": 16} and new["objective"] == {"type": "masked", "eps": 0.1}
    assert new["mixers"].keys() == {"mamba2"} and not {"channel", "channels", "objectives"} & new.keys()
    assert migrate({"model": {"channel": None}}) == {"model": {"ffn": None}}
    assert migrate({"model": new}) == {"model": new}


def test_rwkv7_of_0_1_keeps_its_ranks_and_its_own_values():
    old = {"mixer": "rwkv7,attention", "dim": 2048, "channel": None, "mixers": {"rwkv7": {"decay_rank": None}}}
    options = migrate({"model": old})["model"]["mixers"]["rwkv7"]
    assert options == {"decay_rank": 96, "rate_rank": 96, "gate_rank": 256, "value_residual": False}
    old["mixers"] = {"rwkv7": {"class_path": "x.RWKV7Config", "init_args": {"heads": 4, "gate_rank": 8}}}
    options = migrate({"model": old})["model"]["mixers"]["rwkv7"]
    assert options == {"heads": 4, "decay_rank": 96, "rate_rank": 96, "gate_rank": 8, "value_residual": False}
