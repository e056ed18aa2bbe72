"""`omnimix bench blocks` on lengths that take no time."""

from __future__ import annotations

import json
import sys

import pytest

from omnimix.cli.bench_blocks import SUBJECTS, bench_blocks, main
from omnimix.errors import ConfigError, UnknownName


def test_each_subject_is_timed_in_a_process_of_its_own_or_named(monkeypatch, capsys):
    for package in ("transformers", "mambapy"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main("--blocks mamba2 moe --lengths 5 --repeats 1 --threads 1 --json -".split()) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    ours = [s for s in SUBJECTS if not s.packages and not s.block.startswith("2 × mamba,")]
    assert [(r["block"], r["with"], r["pass"], r["T"]) for r in rows] == [
        (s.block, s.name, kind, 5) for s in ours for kind in ("forward", "forward+backward")
    ]
    assert all(r["ms"] > 0 and r["x last"] > 0 for r in rows)
    missing = [s for s in SUBJECTS if "transformers" in s.packages and not s.block.startswith("2 × mamba,")]
    assert err.count("left out:") == len(missing) and err.count("not installed: transformers") == len(missing)


def test_wrong_options_are_named():
    with pytest.raises(UnknownName, match="did you mean 'mamba' or 'mamba2'"):
        bench_blocks(blocks=["mamba3"])
    with pytest.raises(UnknownName, match="subject"):
        bench_blocks(skip=["transfomers"])
    with pytest.raises(UnknownName, match="dtype"):
        bench_blocks(dtype="float31")
    with pytest.raises(ConfigError, match="at least 1"):
        bench_blocks(lengths=[0])
