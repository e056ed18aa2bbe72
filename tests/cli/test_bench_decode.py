"""`omnimix bench decode` on models and lengths that take no time."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict

import pytest
import torch

from omnimix.cli.bench_decode import Plan, bench_decode, main, measure
from omnimix.cli.bench_decode_models import MODELS, Sizes, build
from omnimix.cli.bench_kernels_peers import in_its_own_process
from omnimix.errors import ConfigError, UnknownName

SIZES = Sizes(dim=64, depth=4, vocab_size=32, window=8)
PLAN = Plan(lengths=(16, 32), steps=1, prompt=16, chunk=16)


def test_the_command_writes_a_table_and_a_plot_and_names_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    sizes = "--dim 64 --depth 1 --vocab_size 32 --batch 2 --lengths 4 2048 --steps 1 --prompt 5 --threads 1"
    picture = tmp_path / "decode.png"
    assert main(f"--models mamba2 {sizes} --json - --plot {picture}".split()) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [(r["model"], r["with"], r["context"]) for r in rows] == [("mamba2", "omnimix", t) for t in (4, 2048)]
    assert all(r["tokens/s"] == pytest.approx(2e3 / r["ms/step"], rel=0.05) for r in rows)
    assert all(r["prompt tokens/s"] > 0 and r["x transformers"] is None for r in rows)
    assert rows[0]["x shortest"] == 1 and rows[0]["state MB"] == rows[1]["state MB"] > 0
    assert "left out: transformers, mamba2: not installed" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_attention_needs_more_memory_for_more_context():
    bytes_of = {}
    for name in MODELS:
        found = measure(build(name, "omnimix", SIZES), SIZES, PLAN, torch.device("cpu"), torch.float32)
        assert found["reading"] > 0 and all(at["ms"] > 0 for at in found["lengths"].values())
        bytes_of[name] = [found["lengths"][length]["state"] for length in PLAN.lengths]
    growing = {name for name, (short, long) in bytes_of.items() if long > short}
    assert growing == {"attention", "hybrid"}
    # Of keys and values, 16 tokens in 4 layers or 1.
    for name, layers in (("attention", 4), ("hybrid", 1)):
        short, long = bytes_of[name]
        assert long - short >= 16 * layers * 2 * SIZES.dim * 4


def test_lengths_beyond_patience_are_left_out():
    plan = Plan(lengths=(4, 1 << 30), steps=1, prompt=4, chunk=4, patience=1.0)
    found = measure(build("gla", "omnimix", SIZES), SIZES, plan, torch.device("cpu"), torch.float32)
    assert list(found["lengths"]) == [4]


def test_transformers_model_has_the_same_size_and_a_constant_state():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    asked = {"model": "mamba2", "side": "transformers", "dtype": "float32", "device": "cpu"}
    found = in_its_own_process("omnimix.cli.bench_decode", asked | {"sizes": asdict(SIZES), "plan": asdict(PLAN)})
    assert found["parameters"] == sum(p.numel() for p in build("mamba2", "omnimix", SIZES).net.parameters())
    short, long = (found["lengths"][str(length)] for length in PLAN.lengths)
    assert short["state"] == long["state"] > 0 and short["ms"] > 0


def test_wrong_options_are_named():
    with pytest.raises(UnknownName, match="did you mean 'mamba2'"):
        bench_decode(models=["mamba3"])
    with pytest.raises(UnknownName, match="dtype"):
        bench_decode(dtype="float31")
    with pytest.raises(ConfigError, match="at least 1"):
        Plan(lengths=(0,))
    with pytest.raises(ConfigError, match="depth is 0"):
        Sizes(depth=0)
