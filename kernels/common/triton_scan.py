"""The scan of a linear recurrence over the first dimension of a tile, for the Triton kernels that need one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """The product of two numbers as pairs; imaginary parts are passed through untouched where there are none."""
    if COMPLEX:
        return ar * br - ai * bi, ar * bi + ai * br
    else:
        return ar * br, bi


@triton.jit
def _combine(a, u, b, v):
    return a * b, b * u + v


@triton.jit
def _combine_complex(ar, ai, ur, ui, br, bi, vr, vi):
    return (
        ar * br - ai * bi,
        ar * bi + ai * br,
        br * ur - bi * ui + vr,
        br * ui + bi * ur + vi,
    )


@triton.jit
def scan(
    ar, ai, ur, ui, row, LOG: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, STEPWISE: tl.constexpr,
):  # fmt: skip
    """h_i = a_i h_{i-1} + u_i from zero, and the products of a up to i; from the other end where REVERSE.

    STEPWISE does the same by `tl.gather` in LOG rounds. Triton's interpreter runs an associative scan number by number
    in Python, which takes minutes, and gathers whole tiles at once.

    Args:
        row: the index along dimension 0, int32, in the tile's shape of 2 ** LOG rows.

    Returns:
        The products and h, each as real and imaginary part.
    """
    if STEPWISE:
        for k in tl.static_range(LOG):
            if REVERSE:
                other = row + (1 << k)
            else:
                other = row - (1 << k)
            inside = (other >= 0) & (other < (1 << LOG))
            index = tl.where(inside, other, 0)
            vr, vi = multiply(ar, ai, tl.gather(ur, index, 0), tl.gather(ui, index, 0), COMPLEX)
            br, bi = multiply(ar, ai, tl.gather(ar, index, 0), tl.gather(ai, index, 0), COMPLEX)
            ur = tl.where(inside, ur + vr, ur)
            ar = tl.where(inside, br, ar)
            if COMPLEX:
                ui = tl.where(inside, ui + vi, ui)
                ai = tl.where(inside, bi, ai)
    elif COMPLEX:
        ar, ai, ur, ui = tl.associative_scan((ar, ai, ur, ui), 0, _combine_complex, reverse=REVERSE)
    else:
        ar, ur = tl.associative_scan((ar, ur), 0, _combine, reverse=REVERSE)
    return ar, ai, ur, ui
