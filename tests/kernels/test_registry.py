"""Backends are loaded when they are first called, also while torch.compile traces."""

import subprocess
import sys

FRESH = """
import torch
from omnimix.kernels import norm, rotary

@torch.compile(fullgraph=True, backend="aot_eager")
def f(x, angle):
    return rotary(norm(x), angle)

x, angle = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 3)
assert torch.equal(f(x, angle), rotary(norm(x), angle))
"""


def test_backends_are_loaded_while_torch_compile_traces():
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
