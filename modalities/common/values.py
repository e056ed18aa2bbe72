"""Values that no picture or sound has: NaN, infinity, and numbers far outside their range."""

from __future__ import annotations

from torch import Tensor

from ...errors import MediaError

# How far beyond 0..1 a floating-point picture may lie: filters that sharpen overshoot by less.
_OVERSHOOT = 0.5


def check_pixels(pixels: Tensor, name: str) -> None:
    """Raise MediaError unless floating-point pixels are finite and in 0..1, give or take what filters overshoot."""
    _check(
        pixels, name, -_OVERSHOOT, 1 + _OVERSHOOT, "floating-point pixels are in 0..1; divide those of 8 bits by 255"
    )


def check_samples(wave: Tensor, name: str, most: float) -> None:
    """Raise MediaError unless the samples of a wave are finite and at most `most` in size."""
    _check(wave, name, -most, most, "floating-point samples are in -1..1; divide those of 16 bits by 32768")


def _check(values: Tensor, name: str, low: float, high: float, remedy: str) -> None:
    if not values.numel():
        return
    least, most = (float(value) for value in values.detach().aminmax())
    # Written so that NaN, which aminmax hands on, fails as well.
    if not (low <= least and most <= high):
        raise MediaError(f"cannot use {name}: its values lie between {least:g} and {most:g}; {remedy}")
