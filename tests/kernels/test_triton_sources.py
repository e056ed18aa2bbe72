"""What neither the interpreter nor the compiler notices in a Triton kernel, read off the sources."""

import ast
from pathlib import Path

import pytest

import omnimix

KERNELS = Path(omnimix.__file__).parent / "kernels"
SOURCES = sorted(KERNELS.glob("**/triton*.py"))
BANNED = {"make_block_ptr", "advance", "make_tensor_descriptor"}


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def faults(source):
    """Every rule broken, as "line: what"."""
    tree = ast.parse(source)
    # `tl.program_id(0).to(tl.int64)`: the call whose attribute `to` is called with int64.
    wide = {
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and [dotted(argument) for argument in node.args] == ["tl.int64"]
    }
    # `tl.program_id(1) * TILE` counts elements within a row, of which there are fewer than 2 ** 31.
    tiles = {
        node.left
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and isinstance(node.right, ast.Name)
        and node.right.id.isupper()
        and isinstance(node.left, ast.Call)
        and [ast.literal_eval(a) for a in node.left.args if isinstance(a, ast.Constant)] != [0]
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        if last in BANNED:
            found.append(f"{node.lineno}: {last} is outside the subset of Triton that we use")
        if last.startswith("atomic_"):
            found.append(f"{node.lineno}: {last}; sum buffers instead, so that results repeat")
        if last == "program_id" and node not in wide | tiles:
            found.append(f"{node.lineno}: write tl.program_id(...).to(tl.int64); its products overflow in int32")
        if name == "tl.load" and not any(k.arg == "mask" for k in node.keywords) and len(node.args) > 1:
            found.append(f"{node.lineno}: pass a load's mask by name")
        if name == "triton.autotune":
            found.append(f"{node.lineno}: use tools.tuned, which bounds the configs and the keys")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(KERNELS)))
def test_sources_keep_the_rules(path):
    assert not faults(path.read_text())


def test_there_are_sources():
    assert {p.parent.name for p in SOURCES} >= {"common", "gated_linear"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("i = tl.program_id(0)", "int64"),
        ("i = tl.program_id(0).to(tl.int32)", "int64"),
        ("i = tl.program_id(0) * TILE", "int64"),
        ("i = tl.program_id(1) * stride", "int64"),
        ("p = tl.make_block_ptr(x, (n,), (1,), (0,), (16,), (0,))", "subset"),
        ("tl.atomic_add(p, x)", "repeat"),
        ("@triton.autotune([], key=[])\ndef f(): pass", "tuned"),
    ],
)
def test_faults_are_found(line, fault):
    (found,) = faults(line)
    assert fault in found


@pytest.mark.parametrize("line", ["i = tl.program_id(0).to(tl.int64) * stride", "i = tl.program_id(1) * TILE"])
def test_what_cannot_overflow_is_no_fault(line):
    assert faults(line) == []
