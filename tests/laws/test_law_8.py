"""Law 8: torch.compile takes everything whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each pays for the imports of torch and omnimix once more; fewer would leave one worker waiting for another.
SHARDS = 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_everything_compiles_whole(shard: int):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    words = ["-q", "-p", "no:cacheprovider", "-p", "tests.laws.one_shard", "--shard", f"{shard}/{SHARDS}"]
    words += ["-o", "addopts=--import-mode=importlib --show-capture=no", "tests/laws/compiled.py"]
    command, root = [sys.executable, "-m", "pytest", *words], Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=plain, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout
