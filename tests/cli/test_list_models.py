"""`omnimix list models` and `omnimix.list_models` with a filter."""

from __future__ import annotations

import pytest

import omnimix as om
from omnimix.cli.commands import model_rows
from omnimix.errors import ConfigError


def test_names_that_match_are_listed():
    found = om.list_models("videomamba_s*")
    assert found == [name for name in om.list_models() if name.startswith("videomamba_s")] and found
    assert om.list_models("nothing*") == []


def test_rows_tell_parameters_and_source():
    [row] = model_rows("videomamba_small")
    assert row["source"] == "arXiv 2312.00752"
    assert row["parameters"] == sum(p.numel() for p in om.create_model("videomamba_small").parameters())


def test_a_filter_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="--filter is 'nothing"):
        model_rows("nothing*")
