"""Sums of powers of a diagonal matrix: the filters and states of S4D (arXiv 2206.11893, section 3.2).

A power a^j with j = i·c + r is a^{ic} a^r, so that a Vandermonde product over t powers is a matrix product of two
factors of about √t columns each: the powers themselves, d·n·t of them, are never made. Complex numbers are pairs of
real tensors, which every device and torch.compile takes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..common.graphs import for_every_length

Pair = tuple[Tensor, Tensor]

# Columns of the fine factor where torch.compile traces.
FINE = 64


def multiply(x: Pair, y: Pair) -> Pair:
    """The product of two complex tensors."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def powers(log_a: Pair, exponents: Float[Tensor, " m"]) -> Pair:
    """a^exponents: (d, n) -> (d, n, m), from the logarithm's real (at most 0) and imaginary part."""
    modulus = (log_a[0][..., None] * exponents).exp()
    angle = log_a[1][..., None] * exponents
    return modulus * angle.cos(), modulus * angle.sin()


def _factors(log_a: Pair, t: int) -> tuple[int, int, Pair, Pair]:
    """The columns of the two factors, then the coarse powers a^{ic} and the fine ones a^r."""
    # A root would fix a traced length. Where none may be fixed, all powers are made.
    if for_every_length():
        coarse, fine = 1, t
    else:
        fine = FINE if torch.compiler.is_compiling() else math.isqrt(t - 1) + 1
        coarse = (t + fine - 1) // fine
    steps = torch.arange(max(fine, coarse), device=log_a[0].device, dtype=log_a[0].dtype)
    return coarse, fine, powers(log_a, steps[:coarse] * fine), powers(log_a, steps[:fine])


def geometric_sum(coefficients: Pair, log_a: Pair, t: int) -> Float[Tensor, "b d t"]:
    """Re Σ_n coefficients_n a_n^j for j < t: coefficients (b, d, n), log_a (d, n)."""
    _, _, coarse, fine = _factors(log_a, t)
    real, imaginary = multiply((coefficients[0][..., None], coefficients[1][..., None]), coarse)
    left = torch.cat([real, -imaginary], dim=-2)
    return torch.einsum("bdni,dnr->bdir", left, torch.cat(fine, dim=-2)).flatten(-2)[..., :t]


def discounted_sum(u: Float[Tensor, "b t d"], log_a: Pair) -> Pair:
    """Σ_j a^j u_j, each (b, d, n): what a state gathers of inputs, the last one first."""
    b, t, d = u.shape
    coarse_size, fine_size, coarse, fine = _factors(log_a, t)
    padded = torch.cat([u, u.new_zeros(b, coarse_size * fine_size - t, d)], dim=1)
    blocks = padded.unflatten(1, (coarse_size, fine_size))
    real, imaginary = (torch.einsum("bird,dnr->bdni", blocks, part) for part in fine)
    real, imaginary = multiply((real, imaginary), coarse)
    return real.sum(-1), imaginary.sum(-1)
