"""What mixers share has one home, `backbones/mixers/parts`."""

from __future__ import annotations

import ast
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


@pytest.mark.parametrize("path", sorted((FOLDER / "reference").glob("*.py")), ids=lambda p: p.stem)
def test_references_stand_on_torch_alone(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            alone = node.level == 1 or (node.level == 0 and node.module in ("__future__", "collections.abc", "torch"))
            assert alone, f"{path.name} imports from {'.' * node.level}{node.module or ''}; a reference is plain torch"
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"math", "torch"}, f"{path.name} imports more than torch"
