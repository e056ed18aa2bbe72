"""S4D by its paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, gelu


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    h_t = Ā h_{t−1} + B̄ u_t, y_t = 2 Re(C h_t) + D u_t with a diagonal complex A (S4D, arXiv 2206.11893,
    section 3), Ā = e^{ΔA}, B̄ = (e^{ΔA} − 1) A⁻¹ B (zero-order hold), Re A = −e^{A_log}, B = 1; then GELU and a linear
    layer with a GLU (as S4's).

    Bidirectional: the mean of two directions, where the published code sums two kernels.
    """
    y = affine(gelu(directions(mixer, (x,), causal, _run)), mixer.out_proj)
    y, gate = y.chunk(2, dim=-1)
    return y * torch.sigmoid(gate)


def _run(branch: Any, u: Tensor) -> Tensor:
    a = torch.complex(-torch.exp(branch.A_log), branch.A_imag)
    delta, c = torch.exp(branch.log_dt)[:, None], torch.complex(branch.C[..., 0], branch.C[..., 1])
    kept = torch.exp(delta * a)
    entering = (kept - 1) / a
    h, outputs = 0, []
    for t in range(u.shape[1]):
        h = kept * h + entering * u[:, t, :, None]
        outputs.append(2 * (c * h).sum(-1).real + branch.D * u[:, t])
    return torch.stack(outputs, 1)
