"""Tables that name files and their labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import ConfigError
from .sources import FileSource, as_index, label_of, name_classes, read_classes, read_utf8, walk_files

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "video", "audio", "image")
_ID_COLUMN = "youtube_id"
_LABEL_COLUMNS = ("label", "class", "category")


class CSVSource(FileSource):
    """Files that a table names, as for Kinetics.

    The table has a header with one of the columns path, file, filename, video, audio, image or youtube_id, and one of
    label, class, category; or no header and the path before the label. Columns are separated by semicolons where the
    first line's are, else by commas, tabs, or by spaces where the line has neither. A label is the name of a class or
    its index. Paths are relative to the table's folder; the files of `youtube_id` are searched for below it, by ID or
    ID_START_END. A file that is missing is an unreadable one, as long as any is there.

    Args:
        table: the .csv file.
        suffixes: of the media files, which tell a sample from a header too.
        classes: by index; None takes those of `classes.json` or `classes.txt` next to the table, or the names that
            occur, in alphabetical order, or the numbers up to the largest.

    Raises:
        ConfigError: no such table, no UTF-8, a header that lacks a column, a row without path or label, labels that
            `classes` does not know, or none of the files is there.
    """

    def __init__(self, table: str | Path, suffixes: Collection[str], classes: Sequence[str] | None = None):
        table = Path(table)
        if not table.is_file():
            raise ConfigError(f"there is no table {str(table)!r}")
        rows = _read_table(table, suffixes)
        if classes is None:
            classes = read_classes(table.parent)
        if classes is None:
            classes = name_classes({label for _, label in rows}, str(table))
        labels = label_of({label for _, label in rows}, classes, str(table))
        super().__init__([(path, labels[label]) for path, label in rows], tuple(classes))
        if not any(os.path.isfile(path) for path in self._paths):
            raise ConfigError(
                f"of the {len(rows)} files that {str(table)!r} names none is there, the first being {self.name(0)!r}; "
                f"paths are relative to {str(table.parent)!r}"
            )


def _read_table(table: Path, suffixes: Collection[str]) -> list[tuple[str, str]]:
    """(path, label) of every row."""
    lines = [(number, line) for number, line in enumerate(read_utf8(table).splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{str(table)!r} is empty")
    try:
        semicolons = _has_semicolons(table, lines[0][1], suffixes)
        rows = [(number, _split(line, ";") if semicolons else _cells(line)) for number, line in lines]
    except csv.Error as error:
        raise ConfigError(f"{str(table)!r} is no table: {error}") from error
    header = [cell.lower() for cell in rows[0][1]]
    found = _columns(table, rows, suffixes)
    headed, at = found is not None, found or (0, 1)
    for number, cells in rows:
        # Without a header exactly two: a third column would leave open which one is the label.
        if len(cells) <= max(at) or not all(cells[i] for i in at) or (not headed and len(cells) != 2):
            raise ConfigError(
                f"line {number} of {str(table)!r} is not a path and a label: {' '.join(cells)[:80]!r}; other tables "
                f"need a header with {', '.join(_PATH_COLUMNS)} or {_ID_COLUMN}, and {', '.join(_LABEL_COLUMNS)}"
            )
    body = [cells for _, cells in rows[headed:]]
    if not body:
        raise ConfigError(f"{str(table)!r} has a header and no rows")
    if headed and header[at[0]] == _ID_COLUMN:
        return _find_ids(table, suffixes, header, body, at)
    return [(os.path.join(table.parent, cells[at[0]]), cells[at[1]]) for cells in body]


def _columns(table: Path, rows: list[tuple[int, list[str]]], suffixes: Collection[str]) -> tuple[int, int] | None:
    """Where the header has the path and the label; None where the first line is a sample.

    Raises:
        ConfigError: a header without one of them: as a sample it would be an unreadable file and a class that is none.
    """
    number, first = rows[0]
    header = [cell.lower() for cell in first]
    path = next((header.index(name) for name in (*_PATH_COLUMNS, _ID_COLUMN) if name in header), None)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    if path is not None and label is not None:
        return path, label
    # A class may be called "label", or a file that is missing have no suffix.
    if _names_file(table, first[0], suffixes):
        return None
    at = label if path is None else path
    bare = not os.path.splitext(first[0])[1] and len(rows) > 1 and _names_file(table, rows[1][1][0], suffixes)
    if at is None and not bare:
        return None
    seen = f"{first[0]!r} is no file" if at is None else f"it has {first[at]!r}"
    lacking = ((path, (*_PATH_COLUMNS, _ID_COLUMN)), (label, _LABEL_COLUMNS))
    columns = " and no column of ".join(", ".join(names) for place, names in lacking if place is None)
    raise ConfigError(
        f"line {number} of {str(table)!r} looks like a header ({seen}) but has no column of {columns}; name one so, "
        "or put a line 'path,label' above if this line is a sample"
    )


def _names_file(table: Path, cell: str, suffixes: Collection[str]) -> bool:
    return os.path.splitext(cell)[1].lower() in suffixes or os.path.isfile(os.path.join(table.parent, cell))


def _has_semicolons(table: Path, first: str, suffixes: Collection[str]) -> bool:
    """Whether semicolons separate the columns, as in spreadsheets where the comma is the decimal point."""
    cells = _split(first, ";")
    known = {*_PATH_COLUMNS, _ID_COLUMN, *_LABEL_COLUMNS}
    # Names of files may hold semicolons too.
    return len(cells) > 1 and (any(cell.lower() in known for cell in cells) or _names_file(table, cells[0], suffixes))


def _split(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]


def _cells(line: str) -> list[str]:
    if "," in line or "\t" in line:
        return _split(line, "," if "," in line else "\t")
    # Names of files may hold spaces, labels of such tables do not.
    return line.strip().rsplit(None, 1)


def _find_ids(
    table: Path, suffixes: Collection[str], header: list[str], body: list[list[str]], at: tuple[int, int]
) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for path in walk_files(table.parent, suffixes):
        # Where a clip lies in two folders, the one of this table's split counts.
        if path.stem not in found or path.is_relative_to(table.parent / table.stem):
            found[path.stem] = str(path)
    rows = []
    for cells in body:
        clip, row = cells[at[0]], dict(zip(header, cells, strict=False))
        names = [clip]
        start, end = row.get("time_start", ""), row.get("time_end", "")
        if as_index(start) is not None and as_index(end) is not None:
            names.insert(0, f"{clip}_{int(start):06d}_{int(end):06d}")
        missing = str(table.parent / table.stem / names[0])
        rows.append((next((found[name] for name in names if name in found), missing), cells[at[1]]))
    return rows
