"""What the commands print: one table for people, or the same rows as JSON for programs."""

from __future__ import annotations

import json as json_module
import os
import sys
import unicodedata
from typing import Any

from .files import replace_file


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that an interrupt or a full disk leaves the old file whole."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def visible(text: Any, keep: str = "") -> str:
    """Text from outside (names of files and classes, messages) for a terminal, which then shows it and obeys nothing.

    Control characters, line ends, direction marks and bytes that are no text appear as the escapes that Python has.

    Args:
        keep: characters that stay as they are.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char in keep or not _obeyed(char) else ascii(char)[1:-1] for char in text)


def _obeyed(char: str) -> bool:
    kind = unicodedata.category(char)
    # Joiners are parts of words and emoji.
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and char not in "\u00ad\u200c\u200d")


def markup(text: Any) -> str:
    """Text from outside for rich, which would take brackets in it for styles."""
    from rich.markup import escape

    return escape(visible(text))


def say(text: Any, *, error: bool = False, keep: str = "") -> None:
    """Print one line at once, to standard output or the standard error; see `visible`."""
    print(visible(text, keep), file=sys.stderr if error else sys.stdout, flush=True)


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
    from rich.text import Text

    def cell(value: Any) -> Text:
        return Text(visible(value))

    table = Table(title=cell(title), title_justify="left")
    for i, key in enumerate(rows[0] if rows else ["(nothing)"]):
        number = bool(rows) and isinstance(rows[0][key], int | float) and not isinstance(rows[0][key], bool)
        table.add_column(cell(key), justify="right" if number else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(cell(_text(value)) for value in row.values()))
    console = Console()
    # A pipe has no width: let the rows be as long as they are, so that grep finds whole lines.
    if not console.is_terminal:
        console = Console(width=max(120, 24 * len(rows[0]) if rows else 0))
    console.print(table)


def short_number(value: float) -> str:
    """A number for a line of a log or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


def duration(seconds: float) -> str:
    """A time for a line of a log: "42 s", "3 min 20 s", "2 h 05 min"."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)
