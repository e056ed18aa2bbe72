"""The loss of a chunk as one Triton kernel; the products around it are torch's.

`_softmax_kernel` moves, for n rows of v logits in float32 and a gradient of s bytes, n · v · (8 + s) bytes (4 without a
gradient): it reads the logits once for the normaliser, which it adds up as it goes (arXiv 1805.02867), and once for the
gradient. It computes about ten operations for each, hence one a byte: bound by the memory, compared with products of
6 · n · v · d operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tools import grid, on_device_of
from .passes import Terms, backend_of

# Elements of a program's tile: one row of many classes, or many rows of few.
TILE = 2048
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _capped(z, cap, CAPPED: tl.constexpr):
    """cap · tanh(z / cap), and its slope."""
    if CAPPED:
        # tanh by the exponential of a number that is never positive.
        e = tl.exp(-2 * tl.abs(z) / cap)
        t = (1 - e) / (1 + e)
        t = tl.where(z < 0, -t, t)
        return cap * t, 1 - t * t
    else:
        return z, z * 0 + 1


@triton.jit
def _softmax_kernel(
    logits, target, upstream, losses, gradient, rows, classes, ignore_index,
    z_loss: tl.constexpr, cap: tl.constexpr, smoothing: tl.constexpr,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    own = tl.load(target + row, mask=there, other=ignore_index)
    line = (row * classes)[:, None]
    # Each lane of a row's block adds up its own classes. What a lane counts before its first class, at the lowest
    # number, is multiplied by 0 once it has seen one, and at the end.
    largest = tl.full((ROWS, BLOCK), LOWEST, ACC)
    total = tl.zeros((ROWS, BLOCK), ACC)
    plain = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, classes, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = there[:, None] & (column < classes)
        z, _ = _capped(tl.load(logits + line + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
        plain += tl.where(inside, z, 0.0)
        z = tl.where(column < classes, z, LOWEST)
        higher = tl.maximum(largest, z)
        total = total * tl.exp(largest - higher) + tl.exp(z - higher)
        largest = higher
    top = tl.max(largest, 1)
    normaliser = top + tl.log(tl.sum(total * tl.exp(largest - top[:, None]), 1))
    known = there & (own >= 0) & (own < classes)
    hit, _ = _capped(tl.load(logits + row * classes + own, mask=known, other=0.0).to(ACC), cap, CAPPED)
    # A target that is no class shows.
    hit = tl.where(known | (own == ignore_index), hit, float("nan"))
    loss = normaliser - (1 - smoothing) * hit - smoothing * tl.sum(plain, 1) / classes
    if z_loss != 0:
        loss += z_loss * normaliser * normaliser
    tl.store(losses + row, loss, mask=there)
    if gradient is not None:
        into = tl.load(upstream + row, mask=there, other=0.0).to(ACC)
        factor = (into * (1 + 2 * z_loss * normaliser))[:, None]
        spread = (into * smoothing / classes)[:, None]
        onto_own = (into * (1 - smoothing))[:, None]
        for start in range(0, classes, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            inside = there[:, None] & (column < classes)
            z, slope = _capped(tl.load(logits + line + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            g = tl.exp(tl.where(inside, z - normaliser[:, None], 0.0)) * factor - spread
            g -= tl.where(column == own[:, None], onto_own, 0.0)
            tl.store(gradient + line + column, (g * slope).to(gradient.dtype.element_ty), mask=inside)


def _softmax(
    logits: Tensor, target: Tensor, upstream: Tensor, terms: Terms, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """See `passes.Softmax`."""
    rows, classes = logits.shape
    losses = torch.empty_like(upstream)
    gradient = None if dtype is None else torch.empty_like(logits, dtype=dtype)
    block = min(TILE, triton.next_power_of_2(classes))
    together = TILE // block
    with on_device_of(logits):
        _softmax_kernel[grid(triton.cdiv(rows, together))](
            logits, target.contiguous(), upstream.contiguous(), losses, gradient, rows, classes, terms.ignore_index,
            terms.z_loss, terms.softcap, terms.smoothing,
            CAPPED=bool(terms.softcap), ROWS=together, BLOCK=block,
            ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32, num_warps=8,
        )  # fmt: skip
    return losses, gradient


cross_entropy_triton = backend_of("triton", _softmax)
