"""The long convolution as plain sums: over lags where there are few taps, over steps where there are few steps.

Rows are the state's inputs followed by the call's; both sums slide a window over them.
"""

import torch
from torch import Tensor


def _by_channel(filters: Tensor, channels: int) -> Tensor:
    return filters.repeat_interleave(channels // filters.shape[0], dim=0)


def _rows(u: Tensor, state: Tensor | None, taps: int, dtype: torch.dtype) -> Tensor:
    """(b, taps - 1 + t, d): zeros stand for a state that is missing."""
    if state is None:
        before = u.new_zeros(u.shape[0], taps - 1, u.shape[2], dtype=dtype)
    else:
        before = state.transpose(1, 2).to(dtype)
    return torch.cat([before, u.to(dtype)], dim=1)


def _split(drows: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """The gradients of u (b, t, d) and of the state (b, d, taps - 1) from that of the rows."""
    return drows[:, taps - 1 :], drows[:, : taps - 1].transpose(1, 2)


def by_lag(u: Tensor, state: Tensor | None, filters: Tensor) -> Tensor:
    """One multiply-add of all steps a tap."""
    (_, t, d), taps = u.shape, filters.shape[1]
    weights, rows = _by_channel(filters, d).t().contiguous(), _rows(u, state, taps, filters.dtype)
    y = rows[:, taps - 1 :] * weights[0]
    for j in range(1, taps):
        y.addcmul_(rows[:, taps - 1 - j : taps - 1 - j + t], weights[j])
    return y


def by_lag_backward(g: Tensor, u: Tensor, state: Tensor | None, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, the state and the filters."""
    (_, t, d), taps = u.shape, filters.shape[1]
    weights, rows = _by_channel(filters, d).t().contiguous(), _rows(u, state, taps, filters.dtype)
    drows, dweights = torch.zeros_like(rows), torch.empty_like(weights)
    for j in range(taps):
        window = slice(taps - 1 - j, taps - 1 - j + t)
        drows[:, window].addcmul_(g, weights[j])
        dweights[j] = (g * rows[:, window]).sum((0, 1))
    dfilters = dweights.t().unflatten(0, (filters.shape[0], -1)).sum(1)
    return *_split(drows, taps), dfilters


def by_step(u: Tensor, state: Tensor, filters: Tensor) -> Tensor:
    """One inner product of window and filter a step; streaming is this."""
    (b, t, d), (groups, taps) = u.shape, filters.shape
    rows = _rows(u, state, taps, filters.dtype).transpose(1, 2).unflatten(1, (groups, -1))
    mirrored = filters.flip(1)[:, None]
    y = u.new_empty(b, t, d, dtype=filters.dtype)
    for i in range(t):
        y[:, i] = (rows[..., i : i + taps] * mirrored).sum(-1).flatten(1)
    return y


def by_step_backward(g: Tensor, u: Tensor, state: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, the state and the filters."""
    t, (groups, taps) = u.shape[1], filters.shape
    rows = _rows(u, state, taps, filters.dtype).transpose(1, 2).unflatten(1, (groups, -1))
    mirrored = filters.flip(1)[:, None]
    drows, dmirrored = torch.zeros_like(rows), torch.zeros_like(mirrored[:, 0])
    for i in range(t):
        g_t = g[:, i].unflatten(1, (groups, -1))[..., None]
        drows[..., i : i + taps].addcmul_(g_t, mirrored)
        dmirrored += (g_t * rows[..., i : i + taps]).sum((0, 2))
    return *_split(drows.flatten(1, 2).transpose(1, 2), taps), dmirrored.flip(1)
