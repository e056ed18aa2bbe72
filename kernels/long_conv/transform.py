"""The long convolution by products of FFTs, a few channels at a time so that spectra stay in the cache.

Filters and inputs are cut into blocks of B, and the spectra of the blocks are convolved (overlap-save): with the filter
in blocks K_j and windows U_m of two blocks each, output block i is the second half of the inverse of Σ_j K_j U_{i-j}.
As long as one window holds everything this is one plain FFT convolution. Beyond `LARGEST` there are more windows, not
larger ones, because FFTs that leave the cache slow down faster than the products add up; and a short filter on a long
sequence takes windows of its own size. The backward pass correlates: products with conjugates.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Blocks: the smallest, where the sequence is as long, and the largest on a CPU.
SMALLEST, LARGEST = 512, 4096
# Elements that are transformed together: 512 KiB of float32. FFT libraries are slow on single rows.
TOGETHER, FEWEST_ROWS = 2**17, 4

# Indices into (b, h, d / h, ...): rows of the batch, groups, channels of a group.
Rows = tuple[slice, slice, slice]


@lru_cache(maxsize=1024)
def block_size(least: int) -> int:
    """The next number of at least `least` whose prime factors are 2, 3 and 5, for which FFTs are fast."""
    size = least
    while True:
        rest = size
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return size
        size += 1


class _Cut:
    """How a convolution is cut: `lead` blocks of zeros and state, `steps` blocks of inputs, `taps` blocks of filter."""

    def __init__(self, u: Tensor, state: Tensor | None, filters: Tensor):
        (self.batch, self.length, self.channels), (self.groups, taps) = u.shape, filters.shape
        on_cpu = u.device.type == "cpu"
        pieces = -(-taps // LARGEST) if on_cpu else 1
        self.size = block_size(max(-(-taps // pieces), min(self.length, SMALLEST)))
        self.taps, self.steps = -(-taps // self.size), -(-self.length // self.size)
        # Without a state one block of zeros stands for all that is before the start.
        self.lead = 1 if state is None else self.taps
        self.windows = self.lead + self.steps - 1
        self.start, self.each, self.dtype = self.lead * self.size, self.channels // self.groups, filters.dtype
        rows = max(1, FEWEST_ROWS // self.windows, TOGETHER // (2 * self.size * self.windows))
        if not on_cpu:
            rows = self.batch * self.channels
        # Groups first, so that each filter is transformed once; then as many rows of the batch as fit.
        self.each_step = min(self.each, rows)
        self.group_step = max(1, rows // self.each)
        self.batch_step = max(1, rows // (self.each_step * self.group_step))

    def by_group(self, x: Tensor) -> Tensor:
        """(b, d, n) as (b, h, d / h, n)."""
        return x.unflatten(1, (self.groups, self.each))

    def windows_of(self, x: Tensor, state: Tensor | None) -> Tensor:
        """Windows of two blocks, each a block after the last, transformed: (..., windows, B + 1).

        Args:
            x: inputs (..., t).
            state: those before them; zeros by default.
        """
        columns = x.new_zeros(*x.shape[:-1], self.start + self.steps * self.size)
        columns[..., self.start : self.start + self.length] = x
        if state is not None:
            columns[..., self.start - state.shape[-1] : self.start] = state
        return torch.fft.rfft(columns.unfold(-1, 2 * self.size, self.size))

    def outputs_of(self, g: Tensor) -> Tensor:
        """Blocks of (..., t) as the second half of a window, transformed: (..., steps, B + 1)."""
        columns = g.new_zeros(*g.shape[:-1], self.steps, 2 * self.size)
        full, rest = divmod(self.length, self.size)
        columns[..., :full, self.size :] = g[..., : full * self.size].unflatten(-1, (full, self.size))
        if rest:
            columns[..., full, self.size : self.size + rest] = g[..., full * self.size :]
        return torch.fft.rfft(columns)

    def spectra(self, filters: Tensor) -> Tensor:
        """K, (g, 1, 1, taps, B + 1) broadcast over windows, with a leading dimension for the rows of the batch."""
        blocks = filters.new_zeros(filters.shape[0], self.taps * self.size)
        blocks[:, : filters.shape[1]] = filters
        return torch.fft.rfft(blocks.unflatten(1, (self.taps, self.size)), n=2 * self.size)[:, None]

    def inverse(self, spectra: Tensor) -> Tensor:
        return torch.fft.irfft(spectra, n=2 * self.size)

    def overlapped(self, windows: Tensor) -> Tensor:
        """The columns whose windows these are, added where they overlap: (..., windows, 2 B) -> (..., columns)."""
        halves = windows.unflatten(-1, (2, self.size))
        blocks = windows.new_empty(*windows.shape[:-2], self.windows + 1, self.size)
        blocks[..., 1:, :] = halves[..., 1, :]
        blocks[..., 0, :] = 0
        blocks[..., :-1, :] += halves[..., 0, :]
        return blocks.flatten(-2)

    def meetings(self) -> Iterator[tuple[int, slice, slice]]:
        """For each filter block: the output blocks that it reaches, and the windows that it meets for them."""
        for j in range(self.taps):
            shift = self.lead - 1 - j
            first = max(0, -shift)
            if first < self.steps:
                yield j, slice(first, self.steps), slice(first + shift, self.steps + shift)

    def group_blocks(self) -> Iterator[slice]:
        for a in range(0, self.groups, self.group_step):
            yield slice(a, min(a + self.group_step, self.groups))

    def rows(self, groups: slice) -> Iterator[Rows]:
        for a in range(0, self.batch, self.batch_step):
            for e in range(0, self.each, self.each_step):
                yield slice(a, a + self.batch_step), groups, slice(e, e + self.each_step)


def by_transform(u: Tensor, state: Tensor | None, filters: Tensor) -> Tensor:
    """Σ_j filters[:, j] u_{t-j}, (b, t, d)."""
    cut = _Cut(u, state, filters)
    inputs, past = cut.by_group(transposed(u, cut.dtype)), None if state is None else cut.by_group(state)
    y = torch.empty_like(inputs)
    for groups in cut.group_blocks():
        taps = cut.spectra(filters[groups])
        for rows in cut.rows(groups):
            windows = cut.windows_of(inputs[rows], None if past is None else past[rows])
            total = torch.zeros_like(windows[..., cut.windows - cut.steps :, :])
            for j, outputs, met in cut.meetings():
                total[..., outputs, :].addcmul_(windows[..., met, :], taps[..., j, None, :])
            y[rows] = cut.inverse(total)[..., cut.size :].flatten(-2)[..., : cut.length]
    return transposed(y.flatten(1, 2))


def by_transform_backward(
    g: Tensor, u: Tensor, state: Tensor | None, filters: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of u, the state and the filters."""
    cut = _Cut(u, state, filters)
    inputs, past = cut.by_group(transposed(u, cut.dtype)), None if state is None else cut.by_group(state)
    g = cut.by_group(transposed(g))
    du, dstate = torch.empty_like(inputs), None if past is None else torch.empty_like(past, dtype=cut.dtype)
    dfilters = torch.empty_like(filters)
    for groups in cut.group_blocks():
        taps = cut.spectra(filters[groups]).conj_physical_()
        of_taps = torch.zeros_like(taps[:, 0])
        for rows in cut.rows(groups):
            windows = cut.windows_of(inputs[rows], None if past is None else past[rows]).conj_physical_()
            ours, of_windows = cut.outputs_of(g[rows]), torch.zeros_like(windows)
            for j, outputs, met in cut.meetings():
                of_windows[..., met, :].addcmul_(ours[..., outputs, :], taps[..., j, None, :])
                of_taps[:, j] += (ours[..., outputs, :] * windows[..., met, :]).sum((0, 2, 3))
            columns = cut.overlapped(cut.inverse(of_windows))
            du[rows] = columns[..., cut.start : cut.start + cut.length]
            if dstate is not None:
                dstate[rows] = columns[..., cut.start - dstate.shape[-1] : cut.start]
        dfilters[groups] = cut.inverse(of_taps)[..., : cut.size].flatten(-2)[:, : filters.shape[1]]
    return (
        transposed(du.flatten(1, 2)),
        None if dstate is None else dstate.flatten(1, 2),
        dfilters,
    )


def transposed(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(b, m, n) as (b, n, m); torch transposes whole contiguous matrices in blocks, anything else by element."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=dtype)
    for row, into in zip(x, out, strict=True):
        into.copy_(row.to(into.dtype).contiguous().t())
    return out
