"""`make test-fast` leaves out cases and examples, and no mixer, op or law but those that a compiler runs long for."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from omnimix.backbones import list_mixers
from omnimix.kernels import ops

ROOT = Path(__file__).parents[1]
# Triton's interpreter, 16,384 tokens, and torch.compile.
SLOW = {
    "test_law_7_long_and_large_inputs_stay_finite",
    "test_law_10_triton_is_the_reference",
    "test_custom_ops_are_sound",
    "test_compiles_whole",
}


def selected() -> dict[str, dict[str, set[str]]]:
    """Identifiers of the tests that the Makefile's command selects, by file and function."""
    (command,) = re.findall(r"pytest (.*not slow.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    words = [word for word in shlex.split(command) if word not in ("-n", "2", "--dist", "worksteal")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-q", "--collect-only", "-p", "no:cacheprovider", "tests/laws"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5_000:] + run.stderr[-5_000:]
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file, function, name in re.findall(r"^tests/laws/(\w+)\.py::(\w+)\[?(.*?)\]?$", run.stdout, re.M):
        found[file][function].add(name)
    return found


@pytest.mark.slow
def test_the_fast_tests_have_every_mixer_op_and_law():
    found = selected()
    for file in ("test_kernel_laws", "test_mixer_laws"):
        source = (ROOT / "tests" / "laws" / f"{file}.py").read_text(encoding="utf-8")
        written = set(re.findall(r"^def (test_\w+)", source, re.M))
        assert written - found[file].keys() == written & SLOW
    for file, laws in (("test_mixer_laws", "test_law_"), ("test_references", "test_law_12_")):
        for function, names in found[file].items():
            if function.startswith(laws):
                mixers = {re.sub(r"-0(-layer-\d+)?$", "", name) for name in names}
                assert mixers == set(list_mixers()), function
    everywhere = {op.name for op in ops()}
    for function in ("test_agrees_with_the_definition", "test_the_backend_named_is_the_one_that_runs"):
        assert {name.split("-")[0] for name in found["test_kernel_laws"][function]} == everywhere
    assert {name.rpartition("-")[2] for name in found["test_kernel_laws"][function]} >= {"chunked", "native"}
