"""The causal depthwise convolution as w shifted multiply-adds over a row that starts with the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv_chunked(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.short_conv`."""
    b, t, d = x.shape
    width = weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    n = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(n, width - 1, d) if initial_state is None else initial_state.to(x.dtype).transpose(1, 2)
    if cu_seqlens is None:
        rows = torch.cat([state, x], dim=1)
        final = rows[:, t:]
    else:
        before, inside, last = _packed_rows(cu_seqlens, t, width - 1)
        rows = x.new_zeros(t + n * (width - 1), d)
        rows = rows.index_copy(0, before.flatten(), state.flatten(0, 1)).index_copy(0, inside, x[0])[None]
        final = rows[0, last]
    wide = rows.to(compute)
    taps = weight.to(compute)
    y = sum(wide[:, j : j + wide.shape[1] - width + 1] * taps[:, j] for j in range(width))
    if cu_seqlens is not None:
        y = y[:, inside - (width - 1)]
    if bias is not None:
        y = y + bias.to(compute)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final.transpose(1, 2).contiguous()


def _packed_rows(cu_seqlens: Tensor, t: int, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where things lie when each packed sequence is preceded by its `history` state rows.

    Returns:
        The rows of the states [n, history], of the t inputs [t], and of the last `history` inputs [n, history].
    """
    cu_seqlens = cu_seqlens.long()
    sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(t, device=cu_seqlens.device), right=True)
    inside = torch.arange(t, device=cu_seqlens.device) + (sequence + 1) * history
    offset = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)[:, None] * history
    steps = torch.arange(history, device=cu_seqlens.device)
    return cu_seqlens[:-1, None] + offset + steps, inside, cu_seqlens[1:, None] + offset + steps
