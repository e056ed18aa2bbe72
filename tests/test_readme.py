"""The README is true: its table is the registry's, and its code runs."""

import re
from pathlib import Path

import pytest

from omnimix.__main__ import COMMANDS
from omnimix.cli.commands import markdown, mixer_rows

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_mixers_is_the_registry():
    table = README.split("<!-- mixers -->\n")[1].split("<!-- /mixers -->")[0]
    assert table == markdown(mixer_rows()), "put the output of `omnimix list mixers --markdown` between the marks"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_code_runs(code: str):
    names: dict[str, object] = {}
    exec("import torch\n" + code, names)
    if "maps" in names:
        assert [m.dim() for m in names["maps"]] == [4] * len(names["maps"])
    elif "written" in names:
        assert [len(tokens) for tokens in names["written"]] == [5, 5]
    elif "film" in names:
        assert names["logits"].shape == (2, 5) and names["step"].so_far.shape == (1, 5)
    else:
        assert names["out"].y.shape == (2, 1, 192)


def test_the_commands_exist():
    named = set(re.findall(r"`omnimix ([a-z]+(?: [a-z]+)?)", README))
    assert named and all(any(c == n or n.startswith(f"{c} ") for c in COMMANDS) for n in named), named


def test_the_pictures_exist():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / picture).stat().st_size > 10_000
