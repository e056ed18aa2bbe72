"""Crop squares from images of any shape."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

# The length of what is resized, as a multiple of what the square covers.
_MARGIN = 2
# Lengths that are compared for a window.
_TRIED = 64


def resized_square(
    images: Float[Tensor, "*t c h w"], size: int, shorter: int, place: float = 0.5
) -> Float[Tensor, "*t c size size"]:
    """Resize images by their shorter side and crop a square.

    What lies far from the square is cropped first: the whole of a resized image of 60000 x 1 pixels takes gigabytes.

    Args:
        size: the side of the square.
        shorter: what the shorter side becomes, at least `size`.
        place: where the square lies along the longer side, from 0, one end, to 1, the other. Along the shorter side it
            is central.
    """
    from torchvision.transforms.v2 import functional as tv

    height, width = images.shape[-2:]
    scale = shorter / min(height, width)
    places = (place if height > width else 0.5, place if width > height else 0.5)
    rows, columns = (_window(side, size, scale, at) for side, at in zip((height, width), places, strict=True))
    if (rows.length, columns.length) == (height, width):
        images = tv.resize(images, [shorter], antialias=True)
    else:
        images = images[..., rows.first : rows.first + rows.length, columns.first : columns.first + columns.length]
        images = tv.resize(images, [rows.resized, columns.resized], antialias=True)
    top = round((images.shape[-2] - size) * rows.place)
    left = round((images.shape[-1] - size) * columns.place)
    return images[..., top : top + size, left : left + size]


class _Window(NamedTuple):
    """The pixels of one side that are resized."""

    first: int
    length: int
    resized: int
    place: float  # of the square among them


def _window(side: int, size: int, scale: float, place: float) -> _Window:
    whole, shown = max(size, int(side * scale)), size / scale
    # Filters see as much as a resized pixel covers on either side.
    least = math.ceil(_MARGIN * shown + 2 * max(1.0, 1 / scale)) + 2
    # An even number of pixels less on either side of the boundary, so that what is central stays central, and a length
    # that the scale turns into a whole number of them as nearly as possible.
    least += (side - least) % 2
    lengths = [
        (abs(length * scale - resized) / length, length, resized)
        for length in range(least, min(side, least + 2 * _TRIED), 2)
        for resized in [whole - 2 * round((whole - length * scale) / 2)]
    ]
    if not lengths:
        return _Window(0, side, whole, place)
    _, length, resized = min(lengths)
    wanted = place * (side - shown)
    first = min(max(0, round(wanted - (length - shown) / 2)), side - length)
    return _Window(first, length, resized, (wanted - first) / (length - shown))
