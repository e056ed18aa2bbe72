"""What recipes make of a command line: defaults, hints, and how to go on after a stop."""

import importlib
import multiprocessing
import shlex
import shutil

import pytest
import yaml

from omnimix.__main__ import main
from omnimix.errors import ConfigError, LostProcess
from omnimix.recipes import CONFIGS, RECIPES
from omnimix.recipes.audio.recipe import AudioClassification
from omnimix.recipes.common.arguments import argument, configurations
from omnimix.recipes.common.cli import interruptible
from omnimix.recipes.common.commands import run_fit
from omnimix.recipes.common.parser import Parser
from omnimix.recipes.common.ranks import lost_process
from omnimix.recipes.common.training import Interrupted
from omnimix.recipes.common.trees import DataTrees, Trees
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.recipes.video.recipe import VideoUnderstanding
from omnimix.recipes.vision.recipe import VisionClassification

MODELS = {
    "vision": VisionClassification,
    "video": VideoUnderstanding,
    "audio": AudioClassification,
    "text": TextGeneration,
}
# What has no default.
REQUIRED = {"path", "root"}
# What the data say a model, and the run its data.
LINKED = {"classes", "clips", "image_size", "in_channels", "seed", "sounds", "vocab_size"}


def of_class(cls: type) -> dict:
    """The defaults of a class, those included that it hands on to its base, as YAML holds them."""
    parser = Parser()
    parser.add_class_arguments(cls, "its")
    defaults = yaml.safe_load(parser.dump(parser.get_defaults(), skip_validation=True, skip_unset=False))["its"]

    def held(values: dict, without: set) -> dict:
        return {
            name: held(v, LINKED) if isinstance(v, dict) else v for name, v in values.items() if name not in without
        }

    return held(defaults, REQUIRED)


def wanted(cls: type, said: dict) -> dict:
    """The defaults of a class under what a configuration says."""
    defaults = of_class(cls)
    return {
        name: default | said.get(name, {}) if isinstance(default, dict) else said.get(name, default)
        for name, default in defaults.items()
    }


def shown(capsys, *argv) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def hold(wanted: dict, given: dict) -> None:
    assert wanted.keys() - given.keys() <= LINKED
    assert given == {**given, **{option: value for option, value in wanted.items() if option in given}}


# What the others leave to a rule, tests/recipes/test_rules.py compares.
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "vision_folder"])
def test_a_configuration_alone_and_the_data_set_itself_say_what_holds(name, tmp_path, capsys):
    (tmp_path / "some.py").write_text("x = 1\n")
    command = [str(tmp_path) if word == "DIR" else word for word in RECIPES[name].split()[1:]]
    said = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    found = shown(capsys, *command)
    module, _, cls = found["data"]["class_path"].rpartition(".")
    data = getattr(importlib.import_module(module), cls)
    options = DataTrees(data)
    own = options.take({"data": {"init_args": {}} | said["data"]})["data"]["init_args"]
    hold(wanted(data, own | options.checked()), found["data"]["init_args"])
    trees = Trees(MODELS[command[0]])
    rest = trees.take(said)["model"]
    hold(wanted(MODELS[command[0]], rest | trees.checked()), found["model"])


def test_another_data_set_takes_nothing_from_the_recipe_s(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("data:\n  class_path: VideoFolderData\n  init_args:\n    root: here\n")
    for argv in (["--config", str(own)], ["--data", "VideoFolderData", "--data.root", "here"]):
        data = shown(capsys, "video", "fit", *argv)["data"]
        assert data["init_args"]["clip"]["size"] == 112 and data["init_args"]["loading"]["keep"] is False
        assert data["init_args"]["augment"] == {"scale": 0.35, "flip": False, "colour": 0.0, "rotate": 0.0}
    off = shown(capsys, "audio", "fit", "--config", "audio_folder", "--data.root", "x", "--data.augment", "null")
    assert off["data"]["init_args"]["augment"] is None and off["model"]["training"]["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("video fit --data.root x", "data is 'x'; there is no such folder or file"),
        ("text fit --data.path x", "data is 'x'; there is no such folder or file"),
        ("video fit --config video_folder", "--data.root is required"),
        ("video fit --data.size 32", "did you mean 'clip.size'?"),
        ("video fit --data.clip.frmes 8", "error: --data: unrecognized arguments: --clip.frmes"),
        ("vision fit --name none --resume", "runs/none' does not exist and cannot be resumed"),
    ],
)
def test_mistakes_are_named_in_one_line(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Union" not in error and "Parser key" not in error


def test_the_last_word_counts(tmp_path, monkeypatch):
    file = tmp_path / "own.yaml"
    file.write_text("name: theirs\n")
    assert argument(["--name", "a", "--name=b"], "--name", "c") == "b"
    assert argument(["--name", "a", "--config", str(file)], "--name", "c") == "theirs"
    assert argument(["-c", str(file), "--name", "a"], "--name", "c") == "a"
    assert argument(["--config", "vision_folder", "--name"], "--name", "c") == "c"
    # A folder is no configuration, whatever its name is.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video_folder").mkdir()
    assert configurations(["--config", "video_folder"], "video_understanding")[1] == CONFIGS / "video_folder.yaml"
    with pytest.raises(ConfigError, match="no configuration ''"):
        configurations(["--config="], "video_understanding")


@pytest.mark.parametrize("when", ["training", "after"])
def test_a_stop_says_how_to_go_on(when, tmp_path, capsys):
    runs = tmp_path / "else where"
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "config.yaml").touch()

    def make(command, argv):
        if when == "training":
            raise Interrupted("stopped after step 3")
        return object()

    def finish(cli):
        raise KeyboardInterrupt

    assert run_fit("vision", ["--runs", str(runs), "--name", "mine"], make, finish) == 130
    stopped, again = capsys.readouterr().out.strip().splitlines()
    assert stopped.startswith({"training": "stopped after step 3", "after": "stopped after the training"}[when])
    assert shlex.split(again.removeprefix("resume with: "))[3:] == ["--name", "mine", "--runs", str(runs), "--resume"]
    shutil.rmtree(runs)
    if when == "after":
        with pytest.raises(KeyboardInterrupt):
            run_fit("vision", ["--runs", str(runs), "--name", "mine"], make, finish)


def test_lightnings_silent_exit_stays_an_interrupt():
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does
    with pytest.raises(SystemExit), interruptible():
        raise SystemExit(3)


LOST = {
    "DataLoader worker (pid 7) is killed by signal: Killed. ": "it was killed by signal: Killed",
    "DataLoader worker (pid(s) 7, 8) exited unexpectedly": "exited unexpectedly",
}


def of_a_partner(ask):
    """What it raises to ask a process that is gone."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    try:
        ask(ours)
    except (ConnectionError, EOFError) as error:
        return error


ASKED = [of_a_partner(lambda pipe: pipe.recv()), of_a_partner(lambda pipe: pipe.send(1))]


@pytest.mark.parametrize("error", [*map(RuntimeError, LOST), *ASKED], ids=["killed", "exited", "recv", "send"])
def test_a_lost_worker_is_one_line(error, tmp_path):
    def make(command, argv):
        raise error

    with pytest.raises(LostProcess) as found:
        run_fit("vision", ["--runs", str(tmp_path), "--name", "mine"], make, lambda cli: None)
    text = str(found.value)
    assert LOST.get(str(error), "has ended") in text and "\n" not in text
    assert text.endswith(f"resume with: omnimix vision fit --name mine --runs {tmp_path} --resume")


@pytest.mark.parametrize("together", [True, False])
def test_a_lost_rank_is_one_line(together, tmp_path, monkeypatch):
    monkeypatch.setattr("omnimix.recipes.common.ranks.world_size", lambda: 2 if together else 1)
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:28733"

    def make(command, argv):
        raise RuntimeError(gloo)

    with pytest.raises(RuntimeError) as found:
        run_fit("vision", ["--runs", str(tmp_path)], make, lambda cli: None)
    assert isinstance(found.value, LostProcess) == together
    if together:
        assert "trains together with this one has ended (Connection closed by peer); resume with" in str(found.value)


SAMPLES = [
    EOFError("Caught EOFError in DataLoader worker process 0."),
    EOFError("Ran out of input"),
    BrokenPipeError(32, "Broken pipe"),
    RuntimeError("size mismatch"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=["sample", "file", "pipe", "model"])
def test_errors_of_files_and_of_samples_are_no_lost_process(error):
    try:
        raise error
    except type(error) as raised:
        assert lost_process(raised) is None
