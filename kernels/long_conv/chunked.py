"""The long convolution by products of FFTs, a few channels at a time so that spectra stay in the cache.

Every call works on rows of S + t inputs, of which the first S belong to the state (S = l - 1, or 0 without a state).
Few taps, or few steps, are summed directly (`direct`): that is quicker, and to the bit causal, while an FFT spreads its
rounding errors over all steps. Only inputs are kept for the backward pass, which transforms them again:
drows = g ⋆ filter and dfilter = g ⋆ rows are correlations, products with a conjugate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .direct import by_lag, by_lag_backward, by_step, by_step_backward

# Taps, or steps, up to which sums are taken directly.
DIRECT = 32
# Elements that are transformed together: 512 KiB of float32. FFT libraries are slow on single rows.
BLOCK, FEWEST_ROWS = 2**17, 4


def long_conv_chunked(
    *,
    u: Tensor,
    filters: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.long_conv`."""
    return _forward(u, filters, skip, initial_state, cu_seqlens)


@lru_cache(maxsize=1024)
def transform_size(least: int) -> int:
    """The next even number of at least `least` whose prime factors are 2, 3 and 5, for which FFTs are fast."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return size
        size += 2


@dataclass
class _Segment:
    """Rows of the batch, or one packed sequence: its inputs, its state, and the taps that reach any of them."""

    u: Tensor
    state: Tensor | None
    filters: Tensor
    steps: slice
    states: slice

    @property
    def history(self) -> int:
        return 0 if self.state is None else self.state.shape[2]

    def way(self) -> str:
        taps, t = self.filters.shape[1], self.u.shape[1]
        return "lag" if taps <= DIRECT else "step" if t <= DIRECT else "transform"

    def size(self) -> int:
        """Of the transforms: with a state, what wraps around falls on outputs that nobody reads."""
        t, taps = self.u.shape[1], self.filters.shape[1]
        return transform_size(t + (self.history if self.state is not None else taps - 1))


def _segments(u: Tensor, filters: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[_Segment]:
    b, t, _ = u.shape
    edges = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    compute = torch.promote_types(u.dtype, torch.float32)
    wide = filters.to(compute)
    for i, (start, end) in enumerate(pairwise(edges)):
        states = slice(0, b) if cu_seqlens is None else slice(i, i + 1)
        own = None if state is None else state[states]
        taps = wide if state is not None else wide[:, : end - start]
        yield _Segment(u[:, start:end], own, taps, slice(start, end), states)


def _transposed(x: Tensor, dtype: torch.dtype, before: Tensor | None = None) -> Tensor:
    """(b, t, d) as (b, d, t), behind the columns of `before`."""
    b, t, d = x.shape
    past = 0 if before is None else before.shape[2]
    out = x.new_empty(b, d, past + t, dtype=dtype)
    if before is not None:
        out[:, :, :past] = before
    for i in range(b):
        # torch transposes whole contiguous matrices in blocks, and anything else element by element.
        if past or x.dtype != dtype:
            out[i, :, past:] = x[i].contiguous().t().contiguous()
        else:
            out[i].copy_(x[i].contiguous().t())
    return out


def _back(x: Tensor, out: Tensor) -> None:
    """The inverse of `_transposed`, into `out`."""
    for source, target in zip(x, out, strict=True):
        target.copy_(source.t())


class _Transforms:
    """FFTs of one size over blocks of channels and rows."""

    def __init__(self, segment: _Segment, batch: int, channels: int):
        self.size = segment.size()
        self.groups, self.each = segment.filters.shape[0], channels // segment.filters.shape[0]
        rows = max(FEWEST_ROWS, BLOCK // self.size)
        if segment.u.device.type != "cpu":
            rows = batch * channels
        # Groups first, so that each filter is transformed once; then as many rows of the batch as fit.
        self.each_step = min(self.each, rows)
        self.group_step = max(1, rows // self.each)
        self.batch_step = max(1, rows // (self.each_step * self.group_step))
        self.batch, self.segment = batch, segment

    def group_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of groups, with their filters' spectra (g, 1, n / 2 + 1)."""
        for a in range(0, self.groups, self.group_step):
            block = slice(a, min(a + self.group_step, self.groups))
            yield block, torch.fft.rfft(self.segment.filters[block], n=self.size)[:, None]

    def row_blocks(self, groups: slice) -> Iterator[tuple[slice, slice, slice]]:
        """Blocks of the batch and of the channels of `groups`, as indices into what `by_group` gives."""
        for a in range(0, self.batch, self.batch_step):
            for e in range(0, self.each, self.each_step):
                yield slice(a, a + self.batch_step), groups, slice(e, e + self.each_step)

    def by_group(self, x: Tensor) -> Tensor:
        """(b, d, t) as (b, h, d / h, t)."""
        return x.unflatten(1, (self.groups, self.each))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=self.size)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(x, n=self.size)


@torch.library.custom_op("omnimix::long_conv_chunked", mutates_args=())
def _forward(
    u: Tensor, filters: Tensor, skip: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, final = _shapes(u, filters, skip, initial_state, cu_seqlens)
    past = filters.shape[1] - 1
    for segment in _segments(u, filters, initial_state, cu_seqlens):
        out = _convolve(segment)
        if skip is not None:
            out.addcmul_(segment.u.to(out.dtype), skip.to(out.dtype))
        y[:, segment.steps] = out
        _keep(segment, final[segment.states], past)
    return y, final


@_forward.register_fake
def _shapes(u, filters, skip, initial_state, cu_seqlens):
    n = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(n, u.shape[2], filters.shape[1] - 1)


def _keep(segment: _Segment, final: Tensor, past: int) -> None:
    """The last `past` inputs into `final`."""
    t = segment.u.shape[1]
    if t < past:
        final[:, :, : past - t] = 0 if segment.state is None else segment.state[:, :, t:]
    kept = min(t, past)
    final[:, :, past - kept :] = segment.u[:, t - kept :].transpose(1, 2)


def _convolve(segment: _Segment) -> Tensor:
    """Σ_j filters[:, j] u_{t-j} in the working dtype, (b, t, d)."""
    if segment.way() == "lag":
        return by_lag(segment.u, segment.state, segment.filters)
    if segment.way() == "step":
        return by_step(segment.u, segment.state, segment.filters)
    b, t, d = segment.u.shape
    past, compute = segment.history, segment.filters.dtype
    transforms = _Transforms(segment, b, d)
    rows = transforms.by_group(_transposed(segment.u, compute, segment.state))
    y = segment.u.new_empty(b, d, t, dtype=compute)
    into = transforms.by_group(y)
    for groups, spectra in transforms.group_blocks():
        for block in transforms.row_blocks(groups):
            product = transforms.forward(rows[block]).mul_(spectra)
            into[block] = transforms.inverse(product)[..., past : past + t]
    out = segment.u.new_empty(b, t, d, dtype=compute)
    _back(y, out)
    return out


def _convolve_backward(g: Tensor, segment: _Segment) -> tuple[Tensor, Tensor]:
    """The gradients of the rows (b, S + t, d), and of the filters that `segment` has."""
    if segment.way() == "lag":
        return by_lag_backward(g, segment.u, segment.state, segment.filters)
    if segment.way() == "step":
        return by_step_backward(g, segment.u, segment.state, segment.filters)
    b, t, d = segment.u.shape
    past, compute = segment.history, segment.filters.dtype
    transforms = _Transforms(segment, b, d)
    rows = transforms.by_group(_transposed(segment.u, compute, segment.state))
    # The gradient stands where its outputs do, behind the state's columns.
    before = None if segment.state is None else torch.zeros_like(segment.state, dtype=compute)
    g = transforms.by_group(_transposed(g, compute, before))
    drows = torch.empty_like(rows)
    dfilters = torch.empty_like(segment.filters)
    for groups, spectra in transforms.group_blocks():
        total = torch.zeros_like(spectra[:, 0])
        for block in transforms.row_blocks(groups):
            ours, theirs = transforms.forward(g[block]), transforms.forward(rows[block])
            # A product with the conjugate, without a conjugated copy.
            total += theirs.conj_physical_().mul_(ours).sum((0, 2))
            drows[block] = transforms.inverse(ours.mul_(spectra.conj()))[..., : past + t]
        dfilters[groups] = transforms.inverse(total)[:, : dfilters.shape[1]]
    out = drows.new_empty(b, past + t, d)
    _back(drows.flatten(1, 2), out)
    return out, dfilters


@torch.library.custom_op("omnimix::long_conv_chunked_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    filters: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du, _, dskip, dstate = _gradient_shapes(dy, dfinal, u, filters, skip, initial_state, cu_seqlens)
    compute = torch.promote_types(u.dtype, torch.float32)
    past = filters.shape[1] - 1
    dfilters = torch.zeros_like(filters, dtype=compute, memory_format=torch.contiguous_format)
    weight = torch.zeros_like(dskip, dtype=compute)
    for segment in _segments(u, filters, initial_state, cu_seqlens):
        history = segment.history
        g = dy[:, segment.steps].to(compute)
        drows, taps = _convolve_backward(g, segment)
        dfilters[:, : taps.shape[1]] += taps
        if skip is not None:
            drows[:, history:].addcmul_(g, skip.to(compute))
            weight += (g * segment.u.to(compute)).sum((0, 1))
        # The last rows are the final state too.
        kept = min(past, drows.shape[1])
        if kept:
            drows[:, drows.shape[1] - kept :] += dfinal[segment.states, :, past - kept :].to(compute).transpose(1, 2)
        du[:, segment.steps] = drows[:, history:]
        if segment.state is not None:
            dstate[segment.states] = drows[:, :history].transpose(1, 2)
    dskip.copy_(weight)
    return du, dfilters.to(filters.dtype), dskip, dstate


@_backward.register_fake
def _gradient_shapes(dy, dfinal, u, filters, skip, initial_state, cu_seqlens):
    dskip = u.new_empty(0) if skip is None else skip.new_empty(skip.shape)
    dstate = u.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return u.new_empty(u.shape), filters.new_empty(filters.shape), dskip, dstate


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy, dfinal):
    u, filters, skip, initial_state, cu_seqlens = ctx.saved_tensors
    du, dfilters, dskip, dstate = _backward(
        dy.contiguous(), dfinal.contiguous(), u, filters, skip, initial_state, cu_seqlens
    )
    return du, dfilters, None if skip is None else dskip, None if initial_state is None else dstate, None


_forward.register_autograd(_differentiate, setup_context=_save)
