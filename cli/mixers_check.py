"""`omnimix mixers check NAME`: all that concerns one mixer, on one thread, in a checkout of the repository."""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingPackage
from ..utils.console import say

ROOT = Path(__file__).resolve().parents[1]
LAWS = (
    "tests/backbones/test_mixer_files.py",
    "tests/laws/test_references.py",
    "tests/laws/test_examples.py",
    "tests/laws/test_low_precision.py",
    "tests/laws/test_mixer_mutations.py",
    "tests/laws/test_mixer_laws.py",
    "tests/laws/test_mixer_declarations.py",
)
# Picks the mixer's tests out of these, and prints a line for each file.
PLUGIN = "tests.laws.one_mixer"
# Under torch.compile shapes are not checked; see the file.
COMPILED = "tests/laws/compiled.py"
PLAIN = "--import-mode=importlib"
CHECKED = f"{PLAIN} --jaxtyping-packages=omnimix,beartype.beartype --strict-markers"
PAGE = "docs/concepts/mixers.md"
TABLE = ("<!-- mixers -->\n", "<!-- /mixers -->")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="omnimix mixers check",
        description="Run all that concerns one mixer: lint, its row in the docs, laws, reference and compilation.",
    )
    parser.add_argument("name", help="the mixer")
    parser.add_argument("--write", action="store_true", help="update the table of mixers in the documentation")
    options = parser.parse_args(argv)
    for package in ("pytest", "ruff"):
        if find_spec(package) is None:
            raise MissingPackage(package, "omnimix mixers check", extra="dev")
    if not (ROOT / LAWS[0]).exists():
        raise ConfigError(f"omnimix is installed in {ROOT} without its tests; run the command in a checkout")
    from ..backbones.mixers import get_mixer

    entry, start = get_mixer(options.name), time.perf_counter()
    steps = (
        ("lint", lambda: _lint(entry)),
        ("documentation", lambda: _table(options.write)),
        ("laws", lambda: _pytest(options.name, LAWS, CHECKED)),
        ("compilation", lambda: _pytest(options.name, (COMPILED,), PLAIN)),
    )
    failed = []
    for i, (title, run) in enumerate(steps, 1):
        say(f"[{i}/{len(steps)}] {title}")
        if not run():
            failed.append(title)
    verdict = f"failed: {', '.join(failed)}" if failed else "all passed"
    say(f"{options.name}: {verdict}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _lint(entry: Any) -> bool:
    files = {inspect.getfile(part) for part in (entry.build, entry.reference) if part is not None}
    commands = (["check", "--quiet"], ["format", "--check", "--quiet"])
    runs = [subprocess.run([sys.executable, "-m", "ruff", *words, *sorted(files)], cwd=ROOT) for words in commands]
    if runs[1].returncode:
        say("  not formatted; run `make format`")
    return not any(run.returncode for run in runs)


def _table(write: bool) -> bool:
    from .commands import markdown, mixer_rows

    file = ROOT / PAGE
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(TABLE[0])
    table, after = rest.split(TABLE[1], 1)
    found = markdown(mixer_rows())
    if table == found:
        return True
    if write:
        file.write_text(f"{before}{TABLE[0]}{found}{TABLE[1]}{after}", encoding="utf-8")
        say("  the table of mixers has been written")
        return True
    say(f"  the table of mixers in {PAGE} is not the registry's; add --write")
    return False


def _pytest(name: str, files: tuple[str, ...], options: str) -> bool:
    """Run what concerns the mixer in these files, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # The plugin and the tests lie in the checkout, which `python -m omnimix` has kept its children from importing.
    environment.pop("PYTHONSAFEPATH", None)
    environment["OMP_NUM_THREADS"] = "1"
    if ROOT.name == __name__.split(".")[0]:
        # This checkout, and not one that may be installed.
        paths = [str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", PLUGIN, "-o", f"addopts={options}"]
    command = [sys.executable, "-m", "pytest", *words, "--mixer", name, *files]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
