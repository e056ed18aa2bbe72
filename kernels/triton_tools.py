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
