"""Which lines and branches of a file run, and which could.

That the body of an `if` without `else` is passed over is a branch without a line: it is told by the negative line.
"""

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
    return (found - left_out) | {-line for line, _ in _conditions(tree).values() if line not in left_out}


def _conditions(tree: ast.AST) -> dict[int, tuple[int, range]]:
    """By the lines of its test: an `if` without `else`, as its first line and the lines of its body.

    Those that raise are left out, as their bodies are, and those for torch.compile.
    """
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not node.orelse and "is_compiling()" not in ast.unparse(node.test):
            if isinstance(node.body[-1], ast.Raise):
                continue
            body = range(node.body[0].lineno, node.body[-1].end_lineno + 1)
            for line in range(node.lineno, node.test.end_lineno + 1):
                # A body on the line of its test cannot be told from it.
                if line not in body:
                    found[line] = (node.lineno, body)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _codes(part)


@contextmanager
def lines_reached(paths: set[Path]) -> Iterator[dict[Path, set[int]]]:
    """Record the lines of these files that run, and the conditions that do not hold."""
    reached: dict[Path, set[int]] = {path: set() for path in paths}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    by_name = {str(path): (lines, _conditions(trees[path])) for path, lines in reached.items()}

    def of_frame(frame: FrameType, event: str, _: Any) -> Any:
        known = by_name.get(frame.f_code.co_filename)
        if known is None:
            return None
        lines, conditions = known
        last = frame.f_lineno

        def of_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            line = frame.f_lineno
            lines.add(line)
            # From a test the next line is in its body, or the condition did not hold.
            if last in conditions and event != "exception":
                condition, body = conditions[last]
                if event == "return" or (line not in body and conditions.get(line, (0,))[0] != condition):
                    lines.add(-condition)
            last = line
            return of_line

        lines.add(last)
        return of_line

    before = sys.gettrace()
    sys.settrace(of_frame)
    try:
        yield reached
    finally:
        sys.settrace(before)


def ranges(lines: set[int]) -> str:
    """Lines for messages: "3, 7-9, 12 is always true"."""
    always = [f"{-line} is always true" for line in sorted(lines, reverse=True) if line < 0]
    parts: list[list[int]] = []
    for line in sorted(line for line in lines if line > 0):
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join([*(str(a) if a == b else f"{a}-{b}" for a, b in parts), *always])
