"""`omnimix bench kernels` on lengths that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from omnimix.cli.bench_kernels import bench_all, main
from omnimix.errors import ConfigError, UnknownName
from omnimix.kernels import get_op

COLUMNS = ["op", "case", "backend", "pass", "T", "ms", "rate", "unit", "of roof", "x reference", "peak MB"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    command = "--ops gated_linear --lengths 3 20 --backends chunked reference --peers sdpa --repeats 2".split()
    assert main([*command, "--json", str(folder / "rows.json"), "--plot", str(folder / "times.png")]) == 0
    assert (folder / "times.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "rows.json").read_text())


def test_every_combination_has_a_row(rows):
    assert all(list(row) == COLUMNS for row in rows)
    cases = [case.name for case in get_op("gated_linear").cases() if case.bench]
    own = {(r["case"], r["backend"], r["pass"], r["T"]) for r in rows if r["op"] == "gated_linear"}
    assert own == {
        (case, backend, direction, length)
        for case in cases
        for backend in ("chunked", "reference")
        for direction in ("forward", "forward+backward")
        for length in (3, 20)
    }
    assert len([r for r in rows if r["backend"] == "sdpa"]) == len(cases) * 4


def test_figures_fit_together(rows):
    by_key = {(r["case"], r["backend"], r["pass"], r["T"]): r for r in rows}
    for (case, backend, direction, length), row in by_key.items():
        assert row["ms"] > 0
        if backend == "chunked":
            reference = by_key[case, "reference", direction, length]
            assert row["x reference"] == pytest.approx(reference["ms"] / row["ms"], rel=0.1, abs=0.06)
        if backend != "sdpa" and direction == "forward":
            op = get_op("gated_linear")
            flops = op.flops(next(c for c in op.cases() if c.name == case).bench(draw(length), length))
            assert row["unit"] == "GFLOP/s"
            assert row["rate"] == pytest.approx(flops / row["ms"] / 1e6, rel=0.05, abs=0.06)
            assert 0 <= row["of roof"] < 1.5


def draw(seed):
    from omnimix.kernels import Draw

    return Draw.seeded(seed)


def test_mamba2_flops_are_those_of_its_products():
    """Per token, 4 K V a head for the state, and within chunks of C = 64 steps 2 C V a head and 2 C K a group."""
    op = get_op("gated_linear")
    case = next(c for c in op.cases() if c.name == "scalar decay, grouped")
    assert op.flops(case.bench(draw(0), 640)) == 640 * (24 * (4 * 128 * 64 + 2 * 64 * 64) + 2 * 64 * 128)


def test_wrong_options_are_named():
    with pytest.raises(UnknownName, match="did you mean 'chunked'"):
        bench_all(backends=["chunkd"])
    with pytest.raises(UnknownName, match="kernel op"):
        bench_all(ops_named=["gated_linera"])
    with pytest.raises(UnknownName, match="dtype"):
        bench_all(dtype="float31")
    with pytest.raises(ConfigError, match="at least 1"):
        bench_all(lengths=[0])


def test_json_goes_to_standard_output_alone(capsys):
    assert main("--ops gated_linear --lengths 2 --backends chunked --peers --repeats 1 --json -".split()) == 0
    cases = [case for case in get_op("gated_linear").cases() if case.bench]
    assert len(json.loads(capsys.readouterr().out)) == 2 * len(cases)


STAND_IN = """
def naive_chunk_simple_gla(q, k, v, g):
    return v * g[..., None].exp() * (q * k).sum(-1, keepdim=True), None
"""


@pytest.mark.parametrize("installed", [True, False])
def test_peers_run_in_a_process_of_their_own_or_are_named(tmp_path, monkeypatch, installed):
    if installed:
        folder = tmp_path / "fla" / "ops" / "simple_gla"
        folder.mkdir(parents=True)
        (folder / "naive.py").write_text(STAND_IN)
    else:
        monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    bench = bench_all(ops_named=["gated_linear"], lengths=[3], backends=["chunked"], peers=["fla chunk"], repeats=1)
    rows = [row for row in bench.rows if row["backend"] == "fla chunk"]
    assert [(row["case"], row["pass"]) for row in rows] == installed * [
        ("scalar decay", "forward"),
        ("scalar decay", "forward+backward"),
    ]
    assert all(row["ms"] > 0 for row in rows)
    assert installed or "not installed" in bench.left_out["fla chunk"]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the high-water mark")
def test_peak_memory_is_what_is_held_at_once():
    # In a process of its own, since packages that other tests load may keep what is freed.
    code = """
import torch
from omnimix.cli.bench_kernels import peak_bytes

def hold():
    first = torch.ones(10_000_000)
    del first
    torch.ones(5_000_000)

print(peak_bytes(hold, torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(40e6, rel=0.1)
