"""The commands that need no training."""

import errno
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import omnimix
from omnimix.__main__ import CLOSED, COMMANDS, main
from omnimix.kernels import ops


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_function(command):
    module, function = COMMANDS[command][0].split(":")
    assert callable(getattr(import_module(module, package="omnimix"), function))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["list", "mixer"], "list mixers"),
        (["lst", "models"], "list models"),
        (["vison", "fit", "--name", "x"], "vision fit"),
        (["envv"], "env"),
        (["kernel", "check"], "kernels check"),
    ],
)
def test_a_mistyped_command_names_the_nearest(capsys, typed, meant):
    assert main(typed) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert f"did you mean 'omnimix {meant}'?" in error


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *((f"bench {name}", ("--threads", "--device")) for name in ("kernels", "blocks", "models", "decode")),
        ("kernels check", ("--device",)),
        ("kernels explain", ("--device",)),
    ],
)
def test_threads_and_devices_that_there_are_not(capsys, command, options):
    wrong = {"--threads": ("0", "threads is 0; it must be at least 1"), "--device": ("abacus", "device is 'abacus'")}
    for option in options:
        value, said = wrong[option]
        assert main([*command.split(), option, value]) == 2
        assert capsys.readouterr().err.startswith(f"omnimix: error: {said}")


@pytest.mark.parametrize("option", ["--json", "--device", "--threads"])
def test_shared_options_are_defined_once(option):
    root = Path(omnimix.__file__).parent
    folders = ("cli", "interop", "recipes", "utils")
    files = [file for folder in folders for file in root.glob(f"{folder}/**/*.py")]
    assert [
        file.name for file in files if f'add_argument("{option}"' in file.read_text().replace("\n        ", "")
    ] == ["options.py"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"omnimix {command}" in shown for command in COMMANDS)
    assert main([]) == 2
    assert main(["vision", "--help"]) == 0
    assert "kernels" not in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"omnimix {omnimix.__version__}"


def test_list_mixers_as_json(capsys):
    assert main(["list", "mixers", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["mixer"] for row in rows] == omnimix.list_mixers()
    assert "growing" in {row["mixer"]: row["causal sequences"] for row in rows}["attention"]


def test_list_models_and_recipes(capsys):
    assert main(["list", "models", "--json", "-"]) == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)] == omnimix.list_models()
    assert main(["list", "recipes", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "vision_classification" in {row["configuration"] for row in rows}
    assert all(row["summary"] for row in rows)


def test_every_configuration_is_listed():
    from omnimix.recipes import CONFIGS, RECIPES

    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


def test_env_says_the_backend_of_every_op_and_why(tmp_path, capsys):
    file = tmp_path / "env.json"
    assert main(["env", "--json", str(file)]) == 0
    assert "omnimix" in capsys.readouterr().out
    rows = {row["item"]: row for row in json.loads(file.read_text())}
    assert rows["omnimix"]["value"] == omnimix.__version__
    for op in ops():
        row = rows[f"{op.name} on cpu"]
        assert row["value"] in {backend.name for backend in op.backends} and row["note"]


def test_explain_shows_each_backend_once(capsys):
    assert main(["kernels", "explain", "norm", "--device", "cpu", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["auto"] for row in rows].count("chosen") == 1
    assert {row["backend"] for row in rows} == {"reference", "chunked", "native", "triton"}


def test_an_error_of_ours_is_one_line(capsys):
    assert main(["kernels", "explain", "nrm"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "omnimix: error: unknown kernel op 'nrm'; did you mean 'norm'?\n"
    with pytest.raises(omnimix.errors.UnknownName):
        main(["kernels", "explain", "nrm", "--debug"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a", None, "last.part"), "device: 'last.part'; make room"),
        (OSError(errno.EFBIG, "File too large"), "File too large; raise the limit"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "denied: 'runs'; change the rights"),
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    ],
)
def test_of_the_system_one_line_says_what_users_can_help(monkeypatch, capsys, error, said):
    def fail(argv):
        raise error

    monkeypatch.setattr("omnimix.cli.commands.env", fail)
    if said is not None:
        assert main(["env"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("omnimix: error: ") and said in line and line.count("\n") == 1
    # Anything else may be a mistake of the program, whose traceback is wanted.
    with pytest.raises(type(error)):
        main(["env", *(["--debug"] if said is not None else [])])


def started(words, output, unbuffered):
    command = [sys.executable, "-m", "omnimix", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["--help"], ""),
        (["--help"], "1"),
        (["audio", "predict", "--help"], ""),
        (["list", "models"], "1"),
        (["env", "--json=-"], "1"),
    ],
)
def test_a_reader_that_has_enough_ends_it_quietly(words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = started(words, writing, unbuffered)
    os.close(writing)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_standard_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = started(["--help"], full, "")
    assert done.returncode == 2
    assert done.stderr.startswith("omnimix: error: No space left on device: 'standard output'; ")
    assert done.stderr.count("\n") == 1
