"""Mamba-2 by its paper."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, heads_of, rms_norm, short_convolution, silu, softplus


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    h_t = e^{Δ_t A} h_{t−1} + Δ_t B_t x_tᵀ, y_t = h_tᵀ C_t + D x_t with a scalar A a head (Mamba-2, arXiv 2405.21060,
    eq. 2 and section 7, figure 6: parallel projections, heads in groups that share B and C, a norm after the gate).

    Δ = softplus(dt + bias), A = −e^{A_log}; x, B and C come from a short convolution and SiLU.
    """
    inner = x.shape[-1] * config.expand
    channels = inner + 2 * config.groups * config.state_size
    z, xbc, dt = affine(x, mixer.in_proj).split((inner, channels, config.heads), dim=-1)
    y = directions(mixer, (xbc, dt), causal, partial(_run, config))
    return affine(rms_norm(y * silu(z), mixer.norm, config.groups), mixer.out_proj)


def _run(config: Any, branch: Any, xbc: Tensor, dt: Tensor) -> Tensor:
    heads, groups = config.heads, config.groups
    xbc = silu(short_convolution(xbc, branch.conv_weight, branch.conv_bias))
    shared = groups * config.state_size
    x, b, c = xbc.split((xbc.shape[-1] - 2 * shared, shared, shared), dim=-1)
    x = heads_of(x, heads)
    # Consecutive heads share a group's B and C.
    b, c = (heads_of(s, groups).repeat_interleave(heads // groups, 2) for s in (b, c))
    delta, a = softplus(dt + branch.dt_bias), -torch.exp(branch.A_log)
    h, outputs = 0, []
    for t in range(x.shape[1]):
        keep = torch.exp(delta[:, t] * a)[..., None, None]
        h = keep * h + delta[:, t, :, None, None] * b[:, t, :, :, None] * x[:, t, :, None]
        outputs.append((h * c[:, t, :, :, None]).sum(2) + branch.D[:, None] * x[:, t])
    return torch.stack(outputs, 1).flatten(-2)
