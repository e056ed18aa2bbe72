"""What mixers share has one home, `backbones/mixers/parts`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from omnimix.backbones import mixers

FOLDER = Path(mixers.__file__).parent
OWN = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base", "registry"}


@pytest.mark.parametrize("name", sorted(OWN))
def test_mixers_import_only_base_classes_from_each_other(name: str):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    bases = {
        base.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in OWN:
            taken = {alias.name for alias in node.names} - bases
            assert not taken, f"{name}.py imports {sorted(taken)} from {node.module}.py; move it to parts/"


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_mixer_is_a_small_file(name: str):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= 150, f"{name}.py has {lines} lines; 150 are allowed, so move a piece to parts/"


@pytest.mark.parametrize("name", sorted(path.stem for path in (FOLDER / "reference").glob("*.py")))
def test_references_stand_on_torch_alone(name: str):
    path, allowed = FOLDER / "reference" / f"{name}.py", {"torch", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        taken = set()
        if isinstance(node, ast.ImportFrom) and node.level != 1:
            taken = {"." * node.level + (node.module or "")}
        if isinstance(node, ast.Import):
            taken = {alias.name for alias in node.names}
        more = {module for module in taken if module.split(".")[0] not in allowed}
        assert not more, f"{path.name} imports {sorted(more)}; a reference stands on torch alone"
