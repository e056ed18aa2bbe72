"""What the commands print: one table for people, or the same rows as JSON for programs."""

from __future__ import annotations

import json as json_module
import os
import sys
from typing import Any

from .files import replace_file


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that an interrupt or a full disk leaves the old file whole."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def emit(title: str, rows: list[dict[str, Any]], json: str | None = None) -> None:
    """Print `rows` as a table, or write them as JSON to the file `json` ("-": standard output).

    With a file the table is printed as well. Columns are the keys of the first row.
    """
    if json == "-":
        sys.stdout.write(json_module.dumps(rows, indent=1, default=str) + "\n")
        return
    if json is not None:
        write_atomically(json, json_module.dumps(rows, indent=1, default=str) + "\n")
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, key in enumerate(rows[0] if rows else ["(nothing)"]):
        number = bool(rows) and isinstance(rows[0][key], int | float) and not isinstance(rows[0][key], bool)
        table.add_column(key, justify="right" if number else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console = Console()
    # A pipe has no width: let the rows be as long as they are, so that grep finds whole lines.
    if not console.is_terminal:
        console = Console(width=max(120, 24 * len(rows[0]) if rows else 0))
    console.print(table)


def short_number(value: float) -> str:
    """A number for a line of a log or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)
