"""The Triton kernels compile ahead of time for every GPU that we name, without spills and within its shared memory.

In processes of their own: here, kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from omnimix.cli.compile_kernels import DEFAULT_TARGETS, TARGETS, Compiled, compile_all, row_of
from omnimix.errors import BackendUnavailable, UnknownName
from omnimix.kernels import ops

SPILLING = """
import json, sys
import torch, triton, triton.language as tl
from omnimix.cli.compile_kernels import TARGETS, compile_only, row_of

@triton.jit
def spilling(x, y, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + i), tl.load(x + N * N + i)
    c = tl.dot(a, b)
    tl.store(y + i, tl.dot(c.to(a.dtype), a) + c + a + b)

rows = []
for name, warps in (("sm_80", 4), ("gfx942", 16)):
    with compile_only(TARGETS[name]) as seen:
        x = torch.empty(2, 128, 128, device="meta", dtype=torch.bfloat16)
        spilling[(1,)](x, torch.empty(128, 128, device="meta"), 128, num_warps=warps)
    rows += [row_of(compiled, TARGETS[name]) for compiled in seen]
json.dump(rows, sys.stdout)
"""

AMDGCN = """
    .private_segment_fixed_size: 0
    .vgpr_count:     32
    .vgpr_spill_count: 0
"""


def started(tmp_path, *command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# All kernels for the NVIDIA GPU with the least shared memory and for AMD's; for the newer ones, a minute each as well
# (`omnimix kernels compile` takes them all), an op that uses all that is new in them.
SOME = {"sm_90": "gated_linear", "sm_100": "gated_linear"}


@pytest.mark.triton
@pytest.mark.parametrize("target", DEFAULT_TARGETS)
def test_every_kernel_fits_every_target(tmp_path, target):
    command = ["-m", "omnimix", "kernels", "compile", "--json", "-", "--targets", target]
    command += ["--ops", SOME[target]] if target in SOME else []
    out, error = started(tmp_path, *command).communicate()
    assert out, error
    rows = json.loads(out)
    assert not [row for row in rows if row["problem"]]
    every = {op.name for op in ops() if any(b.name == "triton" for b in op.backends)}
    assert {row["op"] for row in rows} == ({SOME[target]} if target in SOME else every)
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 512 for row in rows)
    assert all(0 <= row["shared"] <= row["shared limit"] == TARGETS[target].shared for row in rows)
    # Tensor cores are used where there is a product.
    products = [row for row in rows if row["op"] == "gated_linear" and row["kernel"] == "_output_kernel"]
    expected = {"sm_90": {"wgmma"}, "gfx942": {"mfma"}}.get(target)
    assert expected in (None, {row["mma"] for row in products})


@pytest.mark.triton
def test_a_spilling_kernel_is_reported(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    process = started(tmp_path, str(script))
    out, error = process.communicate()
    assert process.returncode == 0, error
    nvidia, amd = json.loads(out)
    assert nvidia["spills"] > 0 and nvidia["stack"] > 0 and "spilled" in nvidia["problem"]
    assert amd["spills"] > 0 and "spilled" in amd["problem"]


def test_too_much_shared_memory_is_reported():
    kernel = SimpleNamespace(asm={"amdgcn": AMDGCN}, metadata=SimpleNamespace(shared=65537))
    compiled = Compiled(name="k", config="", seconds=0.0, kernel=kernel)
    assert row_of(compiled, TARGETS["gfx942"])["problem"] == "needs 65537 bytes of shared memory"
    kernel.metadata.shared = 65536
    assert row_of(compiled, TARGETS["gfx942"])["problem"] == ""


def test_wrong_names_and_the_interpreter_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'sm_90'"):
        compile_all(["sm_91"])
    with pytest.raises(UnknownName, match="dtype"):
        compile_all(dtypes=["bf61"])
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        compile_all(["sm_90"], ["gated_linear"])
