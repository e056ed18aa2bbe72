"""Device functions that the Triton kernels share; only the triton.py files import it, so triton stays optional."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, MODE: tl.constexpr):
    """a @ b for a `tools.dot_mode`: operands cast to the mode's dtype, the product in float32 (or float64).

    Kernels accumulate in the same: `ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32`.
    """
    if MODE == "bfloat16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "float16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif MODE == "float64":
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=MODE)


@triton.jit
def unit_lower_inverse(pointer, C: tl.constexpr, MODE: tl.constexpr):
    """(I - A)^-1 of the strictly lower triangular C x C matrix A at `pointer`; C is 16 or 32.

    The diagonal blocks of 16 by forward substitution, all at once; with X their inverses and L what is left of A,
    (I - A)^-1 = (I + X L) X. A sum of powers of A would cancel.
    """
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    N: tl.constexpr = C // 16
    block, place = tl.arange(0, N), tl.arange(0, 16)
    same = place[:, None] == place[None, :]
    blocks = tl.zeros((N, 16, 16), ACC) + tl.where(same, 1.0, 0.0)[None, :, :]
    rows = pointer + block[:, None] * (16 * C + 16) + place[None, :]
    for r in range(1, 16):
        row = tl.load(rows + r * C).to(ACC)
        row = tl.sum(row[:, :, None] * blocks, 1)
        here = (place == r)[None, :, None]
        blocks += tl.where(here, row[:, None, :], 0.0)
    if N == 1:
        return tl.reshape(blocks, (C, C))
    # Spread over the diagonal of a C x C tile, since a tile cannot be cut into its blocks.
    own = (block[:, None] == block[None, :])[:, None, :, None]
    inverse = tl.reshape(tl.where(own, blocks[:, :, None, :], 0.0), (C, C))
    i = tl.arange(0, C)
    left = tl.load(pointer + i[:, None] * C + i[None, :]).to(ACC)
    left = tl.where(i[:, None] // 16 > i[None, :] // 16, left, 0.0)
    return inverse + dot(dot(inverse, left, MODE), inverse, MODE)
