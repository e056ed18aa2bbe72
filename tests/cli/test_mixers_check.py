"""`omnimix mixers check` runs what concerns one mixer, no more, and fails where any of it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from omnimix.backbones.mixers import get_mixer
from omnimix.cli import mixers_check
from omnimix.errors import ConfigError, UnknownName

TESTS = """
import pytest

@pytest.mark.parametrize("name", ["gla", "xgla"])
def test_it(name):
    assert name == {wanted!r}
"""


@pytest.mark.parametrize(("wanted", "passes"), [("gla", True), ("xgla", False)])
def test_a_failure_of_the_mixer_counts_and_no_others(wanted: str, passes: bool, tmp_path: Path, capfd):
    file = tmp_path / "test_one.py"
    file.write_text(TESTS.format(wanted=wanted))
    assert mixers_check._pytest("gla", (str(file),), mixers_check.PLAIN) is passes
    told = capfd.readouterr().out
    assert ("1 passed" in told) is passes and ("1 failed" in told) is not passes and "xgla]" not in told


def test_no_test_at_all_is_a_failure(tmp_path: Path):
    file = tmp_path / "test_one.py"
    file.write_text(TESTS.format(wanted="gla"))
    assert not mixers_check._pytest("mamba", (str(file),), mixers_check.PLAIN)


def test_lint_and_the_table_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert mixers_check._lint(get_mixer("gla"))
    page = (mixers_check.ROOT / mixers_check.PAGE).read_text(encoding="utf-8")
    mark = mixers_check.TABLE[0]
    monkeypatch.setattr(mixers_check, "ROOT", tmp_path)
    copy = tmp_path / mixers_check.PAGE
    copy.parent.mkdir(parents=True)
    copy.write_text(page.replace(f"{mark}| mixer |", f"{mark}| name |"), encoding="utf-8")
    assert not mixers_check._table(write=False)
    assert "add --write" in capsys.readouterr().out
    assert mixers_check._table(write=True)
    assert copy.read_text(encoding="utf-8") == page


def test_what_cannot_be_checked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnknownName, match="did you mean 'gla'"):
        mixers_check.main(["gal"])
    monkeypatch.setattr(mixers_check, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match="run the command in a checkout"):
        mixers_check.main(["gla"])


def test_a_failing_step_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(mixers_check, "_pytest", lambda name, files, options: mixers_check.COMPILED not in files)
    assert mixers_check.main(["gla"]) == 1
    assert "failed: compilation" in capsys.readouterr().out
    monkeypatch.setattr(mixers_check, "_pytest", lambda name, files, options: True)
    assert mixers_check.main(["gla"]) == 0


def test_references_are_selected_by_the_exact_name():
    options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-p", mixers_check.PLUGIN, "--mixer", "deltanet"]
    addopts = f"addopts={mixers_check.PLAIN}"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-o", addopts, "tests/laws/test_references.py"],
        cwd=mixers_check.ROOT,
        capture_output=True,
        text=True,
    )
    ids = [line.split("[")[1] for line in found.stdout.splitlines() if "[" in line]
    assert len(ids) == 8 and all(name.startswith("deltanet-") for name in ids), found.stdout + found.stderr
