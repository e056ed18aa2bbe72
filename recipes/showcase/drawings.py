"""Pictures drawn with lines and shapes, each another one: what a small folder of a user's own may look like."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

_Pen = dict[str, Any]


def draw(name: str, picture: Any, rng: random.Random) -> Any:
    """One of `DRAWINGS` on paper, in any dark colour, size, place and angle."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    size = picture.size[0]
    radius = size * rng.uniform(0.2, 0.38)
    x, y = (rng.uniform(0.8 * radius, size - 0.8 * radius) for _ in range(2))
    style = {"colour": _ink(rng), "width": rng.randint(2, 5), "turn": rng.uniform(0, 2 * math.pi)}
    DRAWINGS[name](pen, x, y, radius, style, rng)
    return picture


def _ink(rng: random.Random) -> tuple[int, ...]:
    """A colour that can be seen on paper."""
    return tuple(rng.randrange(130) for _ in range(3))


def _points(x: float, y: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(x + r * math.cos(turn + i * step), y + r * math.sin(turn + i * step)) for i, r in enumerate(radii)]


def _polygon(corners: int) -> Callable[..., None]:
    def make(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
        points = _points(x, y, [r * rng.uniform(0.9, 1.05) for _ in range(corners)], style["turn"])
        if rng.random() < 0.5:
            pen.polygon(points, fill=style["colour"])
        else:
            pen.line([*points, *points[:2]], fill=style["colour"], width=style["width"])

    return make


def _disc(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    a, b = r, r * rng.uniform(0.75, 1)
    filled = {"fill": style["colour"]} if rng.random() < 0.5 else {}
    pen.ellipse((x - a, y - b, x + a, y + b), outline=style["colour"], width=style["width"], **filled)


def _ring(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    for part in (1, rng.uniform(0.45, 0.6)):
        pen.ellipse((x - r * part, y - r * part, x + r * part, y + r * part), outline=style["colour"], width=3)


def _star(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    inner = r * rng.uniform(0.35, 0.5)
    pen.polygon(_points(x, y, [r, inner] * 5, style["turn"]), fill=style["colour"])


def _cross(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    for angle in (0, math.pi / 2):
        dx, dy = r * math.cos(style["turn"] + angle), r * math.sin(style["turn"] + angle)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=style["colour"], width=style["width"] + 3)


def _stripes(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    count = rng.randint(4, 7)
    dx, dy = math.cos(style["turn"]), math.sin(style["turn"])
    for i in range(count):
        at = r * (2 * i / (count - 1) - 1)
        a, b = x - at * dy, y + at * dx
        pen.line((a - r * dx, b - r * dy, a + r * dx, b + r * dy), fill=style["colour"], width=style["width"])


def _spiral(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    turns, sense = rng.uniform(2, 3), rng.choice([-1, 1])
    angles = [2 * math.pi * turns * i / 80 for i in range(81)]
    points = [
        (x + r * i / 80 * math.cos(style["turn"] + sense * a), y + r * i / 80 * math.sin(style["turn"] + sense * a))
        for i, a in enumerate(angles)
    ]
    pen.line(points, fill=style["colour"], width=style["width"])


def _wave(pen: Any, x: float, y: float, r: float, style: _Pen, rng: random.Random) -> None:
    waves, height, cos, sin = rng.uniform(1.5, 3), r * rng.uniform(0.3, 0.5), math.cos, math.sin
    points = []
    for i in range(61):
        along, across = r * (i / 30 - 1), height * sin(2 * math.pi * waves * i / 60)
        turn = style["turn"]
        points.append((x + along * cos(turn) - across * sin(turn), y + along * sin(turn) + across * cos(turn)))
    pen.line(points, fill=style["colour"], width=style["width"])


DRAWINGS: dict[str, Callable[..., None]] = {
    "triangle": _polygon(3),
    "square": _polygon(4),
    "hexagon": _polygon(6),
    "disc": _disc,
    "ring": _ring,
    "star": _star,
    "cross": _cross,
    "stripes": _stripes,
    "spiral": _spiral,
    "wave": _wave,
}
