"""Where kernels may import from: an op's folder stands on kernels/ and kernels/common, and on no other op's folder."""

import ast
from pathlib import Path

import pytest

from omnimix import kernels

ROOT = Path(kernels.__file__).parent
FOLDERS = sorted(p.parent for p in ROOT.glob("*/__init__.py"))
OPS = [folder for folder in FOLDERS if folder.name != "common"]


def imported(file: Path) -> set[str]:
    """The modules of kernels/ that a file imports, by the first part of their names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        # Relative to the file's folder; one level up is kernels/.
        where = [*file.relative_to(ROOT).parts[:-1]]
        base = where[: len(where) - (node.level - 1)] if node.level <= len(where) + 1 else None
        if base is None:
            continue
        parts = [*base, *(node.module.split(".") if node.module else [])]
        found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_op_imports_from_another_ones_folder(folder):
    files = sorted(folder.glob("*.py"))
    assert files
    others = {op.name for op in OPS} - {folder.name}
    for file in files:
        assert not imported(file) & others, f"{file.name} imports from {sorted(imported(file) & others)}"


def test_every_op_has_a_folder_of_its_name():
    assert {op.name for op in kernels.ops()} == {folder.name for folder in OPS}


def test_the_scan_sees_imports():
    assert {"common", "custom"} <= imported(ROOT / "gated_linear" / "chunked.py")
    assert "native" in imported(ROOT / "norm" / "native.py")
