"""What a template may compute: how large its values become, how much it does, and for how long."""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

import jinja2

# Characters of one value or of the output at most, whatever is put in, and per character that is.
LARGEST, PER_INPUT = 1 << 22, 4
# Characters and operations of a rendering at most, counted likewise.
WORK, WORK_PER_INPUT = 1 << 26, 64
# Processor time of a rendering.
SECONDS = 10.0
# What an element of a list counts, in characters.
ELEMENT = 16
# Bits of an integer at most.
BITS = 1 << 14
# The meter of the rendering that runs.
METER: ContextVar[Meter] = ContextVar("omnimix_template_meter")
_LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Exceeded(jinja2.TemplateError):
    """A template that computes too much."""


class Meter:
    """Bounds one rendering.

    Args:
        size: characters of its input, with which the bounds rise.
    """

    def __init__(self, size: int):
        self.most = LARGEST + PER_INPUT * size
        self.left = WORK + WORK_PER_INPUT * size
        self.end = time.thread_time() + SECONDS

    def spend(self, cost: int = 0) -> None:
        """Count an operation, and its cost."""
        self.left -= 1 + cost
        if self.left < 0:
            raise Exceeded("it computes too much")
        if time.thread_time() > self.end:
            raise Exceeded(f"it computes for more than {SECONDS:g} seconds")

    def fits_size(self, size: int | None) -> None:
        """Refuse what would have more characters than a value may; None is too many."""
        if size is None or size > self.most:
            raise Exceeded(f"it makes a value of more than {self.most:,} characters")

    def fits(self, value: Any) -> None:
        """Refuse a value that is too large once it is written out."""
        if not isinstance(value, str) or len(value) > self.most:
            tree_size(value, self.most)

    def charge(self, value: Any) -> Any:
        """Count a new value, and return it."""
        self.fits(value)
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(ELEMENT * len(value))
        return value


def tree_size(value: Any, most: int | None) -> int:
    """The characters of a value that is written out; what occurs in it several times counts as often.

    Raises:
        Exceeded: more than `most` (None: any number).
    """
    size, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            size += ELEMENT * len(value)
        elif isinstance(value, _LISTS):
            size += ELEMENT * len(value)
        elif isinstance(value, int):
            size += value.bit_length() // 3 + 1
        if most is not None and size > most:
            raise Exceeded(f"it makes a value of more than {most:,} characters")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, _LISTS):
            waiting += value
    return size


def count(meter: Meter, values: Iterable[Any]) -> Iterator[Any]:
    """The values, each counted as an operation."""
    for value in values:
        meter.spend()
        yield value


def product_fits(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Refuse a product or a power that is too large."""
    if isinstance(right, str | list | tuple):
        left, right = right, left
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        meter.fits_size(len(left) * right * (1 if isinstance(left, str) else ELEMENT))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > BITS:
            raise Exceeded("it makes an integer that is too large")


def width_fits(meter: Meter, specification: str) -> None:
    """Refuse a width or precision, as in `%9d` and `{:9}`, above 999 or from elsewhere."""
    if "*" in specification or "{" in specification or re.search(r"[1-9]\d{3}", specification):
        meter.fits_size(None)
