"""Mamba by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, short_convolution, silu, softplus


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    h_t = Ā h_{t−1} + B̄ x_t, y_t = C h_t + D x_t (Mamba, arXiv 2312.00752, eq. 2 and algorithm 2), Ā = e^{ΔA}, B, C
    and Δ = softplus(W dt + b) from x, which comes from a short convolution and SiLU; y times silu(z) (figure 3).

    As in the published code B̄ is ΔB (Euler) where eq. 4 has zero-order hold, A = −e^{A_log}. In both directions: Vim
    (arXiv 2401.09417, algorithm 1), the mean instead of the sum.
    """
    return affine(
        directions(mixer, affine(x, mixer.in_proj).chunk(2, dim=-1), causal, partial(_run, config)), mixer.out_proj
    )


def _run(config: Any, branch: Any, x: Tensor, z: Tensor) -> Tensor:
    x = silu(short_convolution(x, branch.conv_weight, branch.conv_bias))
    n = config.state_size
    made = affine(x, branch.x_proj)
    dt, b, c = made[..., : -2 * n], made[..., -2 * n : -n], made[..., -n:]
    delta, a = softplus(affine(dt, branch.dt_proj)), -torch.exp(branch.A_log)
    h, outputs = 0, []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1) + branch.D * x[:, t])
    return torch.stack(outputs, 1) * silu(z)
