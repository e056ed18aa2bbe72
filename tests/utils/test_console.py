"""What comes from outside is shown on a terminal, which obeys nothing of it."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
from rich.text import Text

from omnimix.__main__ import main
from omnimix.utils import console

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "[/b]",
    "[red]name[/red]",
    "x\x1b[31mred",
    "a\x07\x08\rb",
    "two\nlines",
    "\u202egnp.exe",
    "\udcff",
    ":smile:",
]


@pytest.fixture
def terminal(monkeypatch):
    """Standard output as a wide terminal with colours."""
    out = io.StringIO()
    wide = {"file": out, "force_terminal": True, "color_system": "truecolor", "width": 400}
    plain = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **options: plain(**wide))
    return out


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_shows_text_as_it_is(text, terminal):
    console.emit(f"title {text}", [{f"key {text}": f"cell {text}", "number": 1.0}])
    found = Text.from_ansi(terminal.getvalue()).plain
    shown = console.visible(text)
    assert all(f"{place} {shown}" in found for place in ("title", "key", "cell"))
    assert not {"\x07", "\x08", "\r", "\u202e", "\udcff"} & set(found)
    assert "\x1b[31mred" not in terminal.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_stays_a_line(text, capsys):
    console.say(f"name {text}")
    console.say(f"name {text}", error=True)
    for found in capsys.readouterr():
        assert found == f"name {console.visible(text)}\n" and found.count("\n") == 1 and found[:-1].isprintable()


def test_words_of_all_languages_stay():
    for text in ("naïve café", "日本語", "नमस्ते", "👩‍👩‍👧", "a\u00a0b", "x²"):
        assert console.visible(text) == text
    assert console.visible("a\x1b[0m\n\x9b") == "a\\x1b[0m\\n\\x9b" and console.visible("a\nb\t", "\n\t") == "a\nb\t"


def test_messages_of_errors_are_shown(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert main(["vision", "predict", "x", "--run", f"{tmp_path}/\x1b[31m[/b]"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "[/b]" in error


def test_nothing_else_prints():
    """Rows that programs read, the usage and the version are the package's own words."""
    allowed = {"__main__.py", "utils/console.py", "cli/commands.py"}
    allowed |= {"cli/bench_blocks.py", "cli/bench_decode.py", "cli/bench_kernels_peers.py"}
    folders = ("utils", "kernels", "backbones", "modalities", "interop", "recipes", "cli")
    for file in [ROOT / "__main__.py", *(f for name in folders for f in (ROOT / name).rglob("*.py"))]:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing or file.relative_to(ROOT).as_posix() in allowed, f"{file}: use utils.console.say"


@pytest.mark.parametrize(
    ("command", "encoding"),
    [("list mixers", "ascii"), ("list mixers", "cp1252"), *(("tëxt→ fit", e) for e in ("ascii", "cp1252", "utf-8"))],
)
def test_consoles_of_other_encodings(command, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "omnimix", *command.split()],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    failed = "list" not in command
    assert done.returncode == (2 if failed else 0), done.stderr
    shown = (done.stderr if failed else done.stdout).decode(encoding)
    if failed:
        assert shown.count("\n") == 1 and ("→" if encoding == "utf-8" else "\\u2192") in shown
    else:
        assert len(shown.splitlines()) > 5 and "UnicodeEncodeError" not in done.stderr.decode(encoding)
