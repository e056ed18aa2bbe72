"""Griffin's recurrent block by its paper."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, short_convolution


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    r_t = σ(W_a x_t + b_a), i_t = σ(W_x x_t + b_x), a_t = a^{c r_t} with a = σ(Λ),
    h_t = a_t ⊙ h_{t−1} + √(1 − a_t²) ⊙ (i_t ⊙ x_t) (Griffin, arXiv 2402.19427, eq. 1 to 4), after a short convolution
    without activation; times GeLU of the other branch, projected (figure 2c).

    As in the published code W_a and W_x are block-diagonal and GeLU is its tanh form. Bidirectional: the mean of two
    directions.
    """
    x, gate = affine(x, mixer.in_proj).chunk(2, dim=-1)
    return affine(directions(mixer, (x,), causal, partial(_run, config)) * _tanh_gelu(gate), mixer.out_proj)


def _run(config: Any, branch: Any, x: Tensor) -> Tensor:
    x = short_convolution(x, branch.conv_weight, branch.conv_bias)
    size, h, outputs = x.shape[-1] // config.blocks, 0, []
    for t in range(x.shape[1]):
        r, i = [], []
        for n in range(config.blocks):
            made = x[:, t, n * size : (n + 1) * size] @ branch.gate_weight[n] + branch.gate_bias[n]
            r.append(torch.sigmoid(made[:, :size]))
            i.append(torch.sigmoid(made[:, size:]))
        a = torch.sigmoid(branch.decay) ** (config.exponent * torch.cat(r, -1))
        h = a * h + (1 - a**2).sqrt() * (torch.cat(i, -1) * x[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1)


def _tanh_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
