"""DeltaNet by its paper, and the delta rule of its variants."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import affine, directions, heads_of, rms_norm, short_convolution, silu, unit


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    S_t = S_{t−1}(I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, o_t = S_t q_t, β = σ(W x) (DeltaNet, arXiv 2406.06484, sections 2
    and 3.3): q, k and v by short convolutions and SiLU, q and k of unit length, RMSNorm by head on the output.

    As in the published code o_t is divided by √d_k. With `negative` β is twice as large (arXiv 2411.12537, section 4).
    """
    dim = x.shape[-1]
    streams = affine(x, mixer.in_proj).split((3 * dim, config.heads), dim=-1)
    mixed = directions(mixer, streams, causal, partial(delta_rule, config, (dim, dim, dim)))
    return affine(rms_norm(mixed, mixer.norm, config.heads), mixer.out_proj)


def delta_rule(
    config: Any, sizes: tuple[int, ...], branch: Any, qkv: Tensor, beta: Tensor, alpha: Tensor | None = None
) -> Tensor:
    """S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / √d_k, (b, t, h · v).

    Args:
        config: the heads, and whether β reaches up to 2.
        sizes: channels of q, k and v.
        branch: has the convolution.
        qkv: before the convolution.
        beta: logits, (b, t, h).
        alpha: (b, t, h, 1) or (b, t, h, k); None for ones.
    """
    heads = config.heads
    qkv = silu(short_convolution(qkv, branch.conv_weight))
    q, k, v = (heads_of(s, heads) for s in qkv.split(sizes, dim=-1))
    q, k, beta = unit(q), unit(k), torch.sigmoid(beta)[..., None] * (2 if config.negative else 1)
    state, outputs = q.new_zeros(q.shape[0], heads, k.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state if alpha is None else alpha[:, t, :, :, None] * state
        held = (k[:, t, :, :, None] * state).sum(2)
        state = state + k[:, t, :, :, None] * (beta[:, t] * (v[:, t] - held))[:, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / k.shape[-1] ** 0.5)
    return torch.stack(outputs, 1).flatten(-2)
