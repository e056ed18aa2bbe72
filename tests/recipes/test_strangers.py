"""A run folder may be a stranger's: opening it imports, runs and writes nothing, and builds nothing of its sizes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from omnimix.__main__ import main
from omnimix.errors import CheckpointError, OmnimixError
from omnimix.recipes.audio.data import AudioData
from omnimix.recipes.common import stored
from omnimix.recipes.common.parser import subclasses
from omnimix.recipes.text.data import TextData
from omnimix.recipes.video.data import VideoData
from omnimix.recipes.vision.data import ImageData
from omnimix.utils.options import cores, set_threads
from omnimix.utils.run_folder import RunFolder

V01 = Path(__file__).parents[1] / "data" / "v01"
EVIL = """
import pathlib
pathlib.Path("imported").touch()
from omnimix.recipes.vision.data import DigitsData
import lightning.pytorch as pl

class Evil(pl.Callback):
    def __init__(self, *args, **options):
        pathlib.Path("made").touch()

class Data(DigitsData):
    pass
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two runs, and a module that leaves a file where it is imported."""
    for name in ("runs", "text"):
        shutil.copytree(V01 / name, tmp_path / name)
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("evil", None)


def change(run: str, **sections) -> None:
    """Change options in a run's configuration; `model__training={...}` merges into a nested section."""
    file = Path("runs") / run / "config.yaml"
    content = yaml.safe_load(file.read_text())
    for place, values in sections.items():
        node = content
        *path, last = place.split("__")
        for key in path:
            node = node[key]
        node[last] = node[last] | values if isinstance(values, dict) and isinstance(node.get(last), dict) else values
    file.write_text(yaml.safe_dump(content))


def files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if "cache" not in file.parts[len(folder.parts) :]}


def opened(run: str, *, fit: bool):
    """What a command takes of a run."""
    return stored.stored_config([], RunFolder(Path("runs") / run), ImageData, fit=fit)


COMMANDS = {
    "vision validate": "vision validate --run runs/vision",
    "text validate": "text validate --run runs/text",
    "vision resume": "vision fit --name vision --resume",
}
OBJECTS = {
    "callbacks": [{"class_path": "evil.Evil"}],
    "logger": {"class_path": "evil.Evil", "init_args": {"save_dir": "/"}},
    "profiler": {"class_path": "evil.Evil"},
    "plugins": [{"class_path": "evil.Evil"}],
    "strategy": {"class_path": "evil.Evil"},
    "accelerator": "evil.Evil",
    "model_registry": "evil",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_objects_of_the_trainer_come_from_the_command_line_alone(command, place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    for run in ("vision", "text"):
        change(run, trainer=OBJECTS)
    before = files(place)
    assert main(COMMANDS[command].split()) == 0
    said = capsys.readouterr().err
    assert all(f"trainer.{name}" in said for name in OBJECTS) and "evil" not in sys.modules
    new = files(place) - before
    if "validate" in command:
        assert not new
    else:
        assert all(file.parts[:2] == ("runs", "vision") for file in new)
    # On the command line they are the user's own.
    if command == "vision validate":
        assert main([*COMMANDS[command].split(), "--trainer.callbacks+=evil.Evil"]) == 0
        assert (place / "made").is_file()


def test_a_run_without_a_logger_stays_without(place):
    change("vision", trainer={"logger": False})
    with opened("vision", fit=True) as argv:
        assert yaml.safe_load(Path(argv[1]).read_text())["trainer"]["logger"] is False


def test_nothing_is_imported_from_the_current_folder(place):
    change("vision", trainer=OBJECTS)
    # It would stand in for a package that is imported.
    (place / "yaml.py").write_text("import pathlib\npathlib.Path('shadowed').touch()\n")
    command = [sys.executable, "-m", "omnimix", *COMMANDS["vision validate"].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"imported", "made", "shadowed"} & {file.name for file in place.iterdir()}


DATA = {"class_path": "evil.Data", "init_args": {"holdout": 0.3}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"data": DATA},
            "data.class_path is 'evil.Data', which is none of omnimix's; what a run names is not",
        ),
        ({"data": DATA}, "name it yourself, --data evil.Data"),
        ({"data": "evil.Data"}, "--data evil.Data"),
        ({"data": {"class_path": ["evil.Data"]}}, "which is no name of a data set"),
        ({"data__init_args": {"jitter": {"class_path": "evil.Evil"}}}, "data.jitter.class_path"),
        ({"data__init_args": {"jitter": "evil.Evil"}}, "data.jitter is 'evil.Evil'; it must be a mapping"),
        ({"data__init_args": {"unknown": 1}}, "DigitsData has no option 'unknown'"),
        ({"model__training": {"class_path": "evil.Evil"}}, "model.training.class_path"),
        ({"model__training": "evil.Evil"}, "model.training is 'evil.Evil'; it must be a mapping"),
        ({"model__training": {"lr": float("nan")}}, "model.training.lr is nan; it must be finite"),
        ({"evil": {"class_path": "evil.Evil"}}, "'evil', which no run has"),
    ],
)
def test_classes_of_strangers_are_refused_by_name(sections, said, place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    for section, values in sections.items():
        change("vision", **{section: values})
    before = files(place)
    for fit in (True, False):
        with pytest.raises(OmnimixError) as error, opened("vision", fit=fit):
            pass
        text = str(error.value)
        assert said in text and "\n" not in text and "config.yaml" in text
    assert "evil" not in sys.modules and files(place) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_the_reason(command, place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    for run in ("vision", "text"):
        change(run, data=DATA)
    assert main(COMMANDS[command].split()) == 2
    error = capsys.readouterr().err
    assert "name it yourself, --data evil.Data" in error and error.count("\n") == 1 and "evil" not in sys.modules


def test_a_part_of_a_stranger_is_none_of_ours(place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    change("vision", model__mixers={"mamba2": {"class_path": "evil.Evil"}})
    assert main(COMMANDS["vision validate"].split()) == 2
    assert "evil.Evil" in capsys.readouterr().err and "evil" not in sys.modules


def test_a_data_set_of_one_s_own_is_named_again(place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    change("vision", data=DATA)
    for command in ("vision resume", "vision validate"):
        shutil.copy("runs/vision/config.yaml", "kept.yaml")
        assert main([*COMMANDS[command].split(), "--data", "evil.Data"]) == 0
        shutil.copy("kept.yaml", "runs/vision/config.yaml")
    assert sys.modules["evil"].Data and "omnimix: error" not in capsys.readouterr().err


@pytest.mark.parametrize("base", [ImageData, VideoData, AudioData, TextData])
def test_no_option_of_ours_names_a_class(base):
    """The parser imports what text says only for arguments that are classes; tensors are for Python alone."""
    for data in subclasses(base):
        classes = {name for name, hint in stored._hints(data).items() if stored._imports(hint)}
        assert classes == ({"tensors"} if data.__name__ == "TensorData" else set())
    assert stored._imports(torch.nn.Module | None) and stored._imports(Callable[[int], int])
    assert stored._imports(list[type[int]]) and not stored._imports(dict[str, int | None])


HOSTILE = {
    # Ten aliases of ten aliases of …: small in the file, and without end to whoever goes through it.
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
    "nested": "[" * 5000,
    "list": "- a",
    "tag": "model: !!python/object/apply:os.system ['touch imported']",
    "digits": "x: " + "9" * 10_000,
    "no mapping": "trainer: [1]",
    "options of 0.1": "model: {channel: moe, channels: [1]}",
    "mixers of 0.1": "model: {channel: moe, mixer: 3}",
    "objective of 0.1": "model: {objectives: [1]}",
    "front of 0.1": "model: {spectrogram: {step: x}}",
    "bits": "model: {dim: 0x" + "f" * 5000 + "}",
    "large": "# " + "x" * (2 << 20),
    "binary": "\x00",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_one_line(content, place):
    Path("runs/vision/config.yaml").write_text(content)
    with pytest.raises(CheckpointError) as error, opened("vision", fit=False):
        pass
    assert "\n" not in str(error.value) and "config.yaml" in str(error.value) and not Path("imported").exists()


SIZES = [
    ({"model": {"dim": 10**9}}, "does not fit the model"),
    ({"model": {"dim": 10**15}}, "must be at most"),
    ({"model": {"dim": 1 << 20}}, "does not fit the model"),
    ({"model": {"depth": 10**8}}, "must be at most"),
    ({"model": {"depth": 1000}}, "it has 2 blocks, and the model 1000"),
    ({"model": {"patch": 10**7}}, "must be a number"),
    ({"model": {"channels": {"moe": {"experts": 10**9}}}}, "does not fit the model"),
    ({"data__init_args": {"batch_size": 0}}, "must be at least 1"),
]


@pytest.mark.parametrize(("sections", "said"), SIZES)
def test_sizes_are_those_of_the_weights(sections, said, place, capsys):
    change("vision", **sections)
    assert main(COMMANDS["vision validate"].split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_sizes_are_those_of_the_saved_state(place, capsys):
    change("vision", model={"dim": 1 << 20})
    assert main(COMMANDS["vision resume"].split()) == 2
    error = capsys.readouterr().err
    assert "cannot resume from" in error and "it is of another model" in error and error.count("\n") == 1
    # Of a damaged state no sizes are known, and nothing is built either.
    os.truncate("runs/vision/checkpoints/last.ckpt", 1000)
    assert main(COMMANDS["vision resume"].split()) == 2
    error = capsys.readouterr().err
    assert "it is damaged" in error and error.count("\n") == 1


def test_threads_and_workers_are_those_of_the_machine(place, capsys):
    change("vision", threads=20_000, trainer={"devices": 500})
    change("text", threads=20_000, data__init_args={"workers": 30_000}, data__init_args__options={})
    for command in ("vision validate", "text validate"):
        assert main(COMMANDS[command].split()) == 0
        said = capsys.readouterr().err
        assert f"threads is 20000; this machine has {cores()} cores" in said
        assert torch.get_num_threads() <= cores()
    assert f"data.workers is 30000 in runs/text/config.yaml: {cores()} are started" in said
    assert main(COMMANDS["vision resume"].split()) == 2
    assert "trainer.devices is 500, and this machine has" in capsys.readouterr().err
    change("vision", trainer={"devices": "9" * 5000})
    assert main(COMMANDS["vision resume"].split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_are_capped_for_everyone(capsys):
    threads = torch.get_num_threads()
    try:
        set_threads(10**9)
        assert torch.get_num_threads() == cores() and "10" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_written_where_a_run_says(place, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside")
    target = outside / "written"
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(target)}}
    profiler = {"class_path": "SimpleProfiler", "init_args": {"dirpath": str(target), "filename": "x"}}
    change("text", trainer={"logger": logger, "profiler": profiler, "default_root_dir": str(target)}, runs=str(target))
    change("text", data__init_args__options={"cache": str(target)})
    change("vision", runs=str(target), trainer={"default_root_dir": str(target), "logger": True})
    before = files(place)
    assert main(COMMANDS["text validate"].split()) == main(COMMANDS["vision validate"].split()) == 0
    assert files(place) == before
    assert main(COMMANDS["vision resume"].split()) == 0
    assert main(["text", "fit", "--name", "text", "--resume"]) == 0
    assert not list(outside.iterdir())
