"""Which lines of a file run, and which could."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def lines_of_functions(path: Path) -> set[int]:
    """The lines of function bodies that hold instructions, but for `raise` statements, abstract methods, and what is
    for torch.compile only, which does not run line by line."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        abstract = isinstance(node, ast.FunctionDef) and any(
            getattr(d, "id", "") == "abstractmethod" for d in node.decorator_list
        )
        if isinstance(node, ast.Raise) or abstract:
            left_out.update(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "torch.compiler.is_compiling()":
            left_out.update(line for part in node.body for line in range(part.lineno, part.end_lineno + 1))
    found: set[int] = set()
    for code in _codes(compile(source, str(path), "exec")):
        # A class body is no function: its code has no fast locals.
        if code.co_flags & 2:
            found.update(line for _, _, line in code.co_lines() if line and line != code.co_firstlineno)
    return found - left_out


def _codes(code: CodeType) -> Iterator[CodeType]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _codes(part)


@contextmanager
def lines_reached(paths: set[Path]) -> Iterator[dict[Path, set[int]]]:
    """Record the lines of these files that run."""
    reached: dict[Path, set[int]] = {path: set() for path in paths}
    by_name = {str(path): lines for path, lines in reached.items()}

    def of_frame(frame: FrameType, event: str, _: Any) -> Any:
        lines = by_name.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def of_line(frame: FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return of_line

        lines.add(frame.f_lineno)
        return of_line

    before = sys.gettrace()
    sys.settrace(of_frame)
    try:
        yield reached
    finally:
        sys.settrace(before)


def ranges(lines: set[int]) -> str:
    """Lines for messages: "3, 7-9"."""
    parts: list[list[int]] = []
    for line in sorted(lines):
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
