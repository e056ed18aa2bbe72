"""The library logs and prints nothing; commands print what it logs."""

import ast
import io
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from omnimix.__main__ import COMMANDS, main
from omnimix.utils import log

LOGGER = log.logger_of("omnimix.some.module")


def test_records_arrive_and_nothing_is_printed(caplog, capfd):
    with caplog.at_level(logging.INFO, "omnimix"):
        LOGGER.info("built %s", "norm")
        LOGGER.warning("left out: %s", "a file")
    assert caplog.messages == ["built norm", "left out: a file"]
    assert caplog.records[0].name == "omnimix.some.module"
    assert capfd.readouterr() == ("", "")


def test_commands_print_records_in_one_line_each(capfd):
    with log.printed():
        LOGGER.info("built \x1b[31m%s", "norm")
        LOGGER.debug("a detail")
    LOGGER.warning("afterwards")
    assert capfd.readouterr() == ("", "built \\x1b[31mnorm\n")


def test_a_command_prints_what_is_logged_while_it_runs(monkeypatch, capfd):
    def command(argv):
        LOGGER.info("working")
        return 0

    monkeypatch.setitem(sys.modules, "omnimix.cli.tried", type(sys)("tried"))
    sys.modules["omnimix.cli.tried"].main = command
    monkeypatch.setitem(COMMANDS, "list tried", (".cli.tried:main", "a command"))
    assert main(["list", "tried"]) == 0
    assert capfd.readouterr() == ("", "working\n")
    root = logging.getLogger("omnimix")
    assert root.level == logging.NOTSET and root.propagate and len(root.handlers) == 1


def test_commands_that_overlap_print_until_the_last_ends(capfd):
    first, second, root = log.printed(), log.printed(), logging.getLogger("omnimix")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    LOGGER.info("once")
    second.__exit__(None, None, None)
    LOGGER.info("no more")
    assert capfd.readouterr() == ("", "once\n")
    assert root.level == logging.NOTSET and root.propagate and len(root.handlers) == 1


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_progress_is_a_record_where_no_command_has_a_terminal(level, caplog, capfd):
    with (
        caplog.at_level(logging.DEBUG, "omnimix"),
        log.progress(LOGGER, "writing", 2, level=level) as advance,
    ):
        advance(1)
        advance(1)
    assert [(r.levelno, r.message) for r in caplog.records] == [(level, "writing")]
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_the_terminal_of_a_command_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for command in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with log.printed() if command else pytest.MonkeyPatch.context(), log.progress(LOGGER, "writing", 1) as advance:
            advance(1)
        assert ("writing" in terminal.getvalue()) == command


ROOT = Path(__file__).parents[2]
LIBRARY = [
    file for folder in ("backbones", "interop", "kernels", "modalities") for file in (ROOT / folder).rglob("*.py")
]


def test_the_library_calls_nothing_that_prints():
    printing = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in LIBRARY
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "say", "sys.stdout.write", "rich.print")
    ]
    assert len(LIBRARY) > 150 and not printing


# What builds the kernels is replaced by a program that does nothing, and says so as the real one does.
PROGRAM = """
import pathlib, tempfile
import torch
import omnimix as om
from omnimix.kernels import native
from omnimix.recipes.audio.sounds import logger, write_sounds
from omnimix.utils.log import progress

with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    assert native._compile("norm", "true", folder / "norm.so") is None
    write_sounds(folder, ())
with progress(logger, "reading", 1) as advance:
    advance(1)
logger.warning("skipped: a file")
net = om.Backbone(om.BackboneConfig(dim=16, depth=1, pattern=("gla",)))
net(torch.randn(1, 4, 16), om.Layout(causal=True))
"""


@pytest.mark.slow
def test_a_program_that_sets_up_no_log_prints_nothing():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
