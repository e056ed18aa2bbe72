"""Every system under FSDP2, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .systems import systems


def test_every_system_is_the_same_in_shards(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("sharded.py"))]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-5_000:] + run.stderr[-10_000:]
    assert run.stdout.split("\n")[:-1] == [*systems(), "all equal"]
