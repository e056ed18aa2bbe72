"""CONTRIBUTING.md is true: following its pages, to the letter, gives parts that obey the laws."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```(\w+)(?: file=(\S+))?\n(.*?)^ *```", re.M | re.S)


def follow(page: str, root: Path) -> list[str]:
    """Do what the code blocks of `page` say in a copy of the repository, and return the shell commands."""
    commands = []
    for language, file, text in BLOCK.findall(page):
        text = textwrap.dedent(text)
        if language == "sh":
            commands += text.strip().splitlines()
        elif language == "diff":
            content = (root / file).read_text()
            removed = "\n".join(line[1:] for line in text.splitlines() if line.startswith("-"))
            added = "\n".join(line[1:] for line in text.splitlines() if line.startswith("+"))
            assert removed in content, f"{file} has no line {removed!r}"
            (root / file).write_text(content.replace(removed, added))
        else:
            (root / file).write_text(text)
    return commands


PAGES = {
    "Add a mixer": (".venv/bin/omnimix mixers check fading --write", "backbones/mixers/fading.py", 37),
    "Add a modality": (
        ".venv/bin/python -m pytest tests/laws/test_modality_laws.py -k SeriesClassifier",
        "modalities/series.py",
        8,
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("title", PAGES)
def test_following_a_page_gives_a_part_that_obeys_the_laws(title: str, tmp_path: Path):
    command, file, least = PAGES[title]
    root = tmp_path / "omnimix"
    shutil.copytree(
        ROOT, root, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "build", "__pycache__", ".*_cache")
    )
    page = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {title}")[1].split("\n## ")[0]
    assert follow(page, root) == [command]
    assert (root / file).read_text().count("\n") <= 150
    words = command.split()
    own = words[0].endswith("omnimix")
    given = ["-m", "omnimix", *words[1:]] if own else [*words[1:], "-q", "-p", "no:cacheprovider", "--durations=0"]
    run = subprocess.run(
        [sys.executable, *given],
        cwd=root,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-3_000:]
    passed = sum(int(number) for number in re.findall(r"(\d+) passed", run.stdout))
    # Without triton its law is left out.
    missing = find_spec("triton") is None
    assert passed + missing >= least and (missing or " skipped" not in run.stdout)
    assert (
        str(ROOT)
        not in subprocess.run(
            [sys.executable, "-c", "import omnimix; print(omnimix.__file__)"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        ).stdout
    )
