"""Jinja's filters and the methods of strings for templates of strangers: refused before they take much memory."""

from __future__ import annotations

import functools
import json
import re
import string
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.filters import FILTERS, make_attrgetter

from .meter import METER, Meter, count, tree_size, width_fits

# Filters for web pages, whose work or output is not bounded by the size of their input.
_WITHOUT = ("striptags", "urlize", "xmlattr", "wordwrap", "pprint")


def bounded_filters() -> dict[str, Any]:
    """The filters of a sandbox by name."""
    own = {"tojson": _tojson, "join": _join, "sum": _sum, "format": _format}
    filters = {name: f for name, f in FILTERS.items() if name not in _WITHOUT} | own
    return {name: _measured(name, function) for name, function in filters.items()}


def _measured(name: str, function: Any) -> Any:
    """A filter whose arguments and result are measured, and refused before they take much memory."""
    check = _CHECKS.get(name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.spend()
        for value in (*args, *kwargs.values()):
            meter.fits(value)
        if check is not None:
            check(meter, *args[hasattr(function, "jinja_pass_arg") :], **kwargs)
        result = function(*args, **kwargs)
        return count(meter, result) if isinstance(result, types.GeneratorType) else meter.charge(result)

    return call


def _indent(meter: Meter, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    text, width = str(text), width if isinstance(width, int) else len(width)
    meter.fits_size(len(text) + (text.count("\n") + 1) * width)


def _wide(meter: Meter, value: Any, width: int = 80, *_: Any, **__: Any) -> None:
    meter.fits_size(int(width))


def _parts(meter: Meter, value: Any, parts: int = 0, *_: Any, **options: Any) -> None:
    meter.fits_size(16 * int(options.get("linecount", options.get("slices", parts))))


def _places(meter: Meter, value: Any, precision: int = 0, *_: Any, **__: Any) -> None:
    meter.fits_size(0 if abs(int(precision)) <= 300 else None)


def _replaced(meter: Meter, text: Any, old: Any, new: Any, most: Any = None, **options: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    found, most = text.count(old), options.get("count", most)
    found = found if most is None or most < 0 else min(found, most)
    meter.fits_size(len(text) + found * max(0, len(new) - len(old)))


# What is checked before a filter runs.
_CHECKS = {
    "indent": _indent,
    "center": _wide,
    "batch": _parts,
    "slice": _parts,
    "round": _places,
    "replace": _replaced,
}


def method_args(name: str, text: str, *args: Any, **options: Any) -> tuple[Any, ...]:
    """The arguments of a method of a string, refused where what it returns would be too large."""
    meter = METER.get()
    if name in ("center", "ljust", "rjust", "zfill") and args:
        meter.fits_size(int(args[0]))
    elif name == "expandtabs":
        args = (options.get("tabsize", args[0] if args else 8),)
        meter.fits_size(len(text) + text.count("\t") * int(args[0]))
    elif name == "replace" and len(args) > 1:
        _replaced(meter, text, *args[:3])
    elif name == "join" and args:
        args = (_joinable(meter, text, args[0]),)
    elif name in ("rfind", "rindex", "rsplit", "rpartition") and args and isinstance(args[0], str):
        # Python searches backward in the product of both lengths.
        meter.fits_size(None if len(text) * len(args[0]) > 1 << 30 else 0)
    return args


def _joinable(meter: Meter, between: str, values: Iterable[Any]) -> list[Any]:
    values = list(count(meter, values))
    meter.fits_size(tree_size(values, meter.most) + len(between) * len(values))
    return values


def check_percent(form: str, values: Any) -> None:
    """Check that `form % values` is not too large: the widths in it, and each value as often as there are places."""
    meter = METER.get()
    for piece in form.split("%")[1:]:
        # A name in brackets comes before the width.
        piece = piece.partition(")")[2] if piece.startswith("(") else piece
        width_fits(meter, re.findall(r"^[-#0 +]*[\d.*]*", piece)[0])
    values = list(values.values()) if isinstance(values, Mapping) else values
    longest = max(
        (tree_size(v, meter.most) for v in (values if isinstance(values, list | tuple) else [values])), default=0
    )
    meter.fits_size(len(form) + form.count("%") * longest)


def check_format(form: str, values: Sequence[Any]) -> None:
    """Check that `form.format(*values)` is not too large."""
    meter, places = METER.get(), 0
    for _, name, specification, _ in string.Formatter().parse(form):
        if name is not None:
            places += 1
            width_fits(meter, specification or "")
    meter.fits_size(len(form) + places * tree_size(list(values), meter.most))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    meter, found, size = METER.get(), [], 0
    if indent is not None:
        meter.fits_size(0 if (indent if isinstance(indent, int) else len(indent)) <= 100 else None)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for piece in encoder.iterencode(value):
        size += len(piece)
        meter.fits_size(size)
        found.append(piece)
    return "".join(found)


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return str(d).join(map(str, _joinable(METER.get(), str(d), value)))


@jinja2.pass_context
def _sum(context: Any, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    for item in value:
        start = context.environment.call_binop(context, "+", start, item)
    return start


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    check_percent(str(value), kwargs or args)
    return str(value) % (kwargs or args)
