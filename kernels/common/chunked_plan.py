"""How chunked backends walk through time: chunks, blocks of chunks, packed sequences, scratch memory.

A *chunk* is a run of steps of one sequence that is handled by matrix products. A *block* is a set of chunks that are
handled together because their working set fits into the cache: consecutive chunks of a few sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import SymInt, Tensor

CHUNK = 64
# Aimed at: the operands of one block, in bytes. Measured: smaller blocks pay for calls, larger ones for cache misses.
BLOCK_BYTES = 3 << 19
# How steep decays of a chunk may be that is factorised: e^50 leaves float32 a factor of 1e16 for the values.
FACTORISE = 50.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive chunks of a few sequences.

    Args:
        batch, time: where its steps are in the tensors `(batch, time, ...)`.
        chunk: steps in a chunk.
        region: the steps around it that are divided into chunks of that size.
        states: the rows of its sequences in state tensors.
        steps: in order of time, the chunks that may be handled at once, as (first, number) in the block's chunk order
            (time first, then sequence). The number never grows: longer sequences come first.
        saved: the row of the first state at its start among the saved ones.
    """

    batch: slice
    time: slice
    chunk: int
    region: slice
    states: slice
    steps: tuple[tuple[int, int], ...]
    saved: int

    @property
    def alive(self) -> int:
        """How many sequences reach into this block; they are the first ones of `states`."""
        return self.steps[0][1]

    def view(self, x: Tensor, parts: int = 1) -> Tensor:
        """`(batch, time, ...)` -> `(count, sequences, parts, chunk / parts, ...)`, a view."""
        x = x[self.batch, self.time]
        return x.unflatten(1, (-1, parts, self.chunk // parts)).transpose(0, 1)


def sizes(chunk_bytes: int, sequences: int, chunks: int) -> tuple[int, int]:
    """How many sequences, and how many chunks of each, go into a block."""
    fit = max(1, BLOCK_BYTES // chunk_bytes)
    rows = min(sequences, fit)
    return rows, max(1, min(chunks, fit // rows))


def batch_blocks(batch: int, time: int, chunk_bytes: int) -> Iterator[Block]:
    """The blocks of `batch` sequences of `time` steps each; a tail shorter than a chunk is a block of its own."""
    chunk = min(CHUNK, time)
    whole = time // chunk
    rows, count = sizes(chunk_bytes, batch, whole)
    body, rest = slice(0, whole * chunk), slice(whole * chunk, time)
    saved = 0
    for first in range(0, batch, rows):
        n = min(rows, batch - first)
        where = slice(first, first + n)
        for c in range(0, whole, count):
            m = min(count, whole - c)
            steps = tuple((i * n, n) for i in range(m))
            times = slice(c * chunk, (c + m) * chunk)
            yield Block(batch=where, time=times, chunk=chunk, region=body, states=where, steps=steps, saved=saved)
            saved += n
        if tail := time - whole * chunk:
            yield Block(batch=where, time=rest, chunk=tail, region=rest, states=where, steps=((0, n),), saved=saved)
            saved += n


def saved_states(steps: int | SymInt, sequences: int | SymInt) -> int | SymInt:
    """How many states the blocks start from, at most: one a chunk. A bound, so that it holds for symbolic sizes too."""
    return steps // CHUNK + sequences


class Packing:
    """Sequences of different lengths, laid out so that those of a group advance together.

    Each sequence is padded to whole chunks. Within a group the longest comes first, and chunk s of every sequence that
    has one lies before chunk s + 1 of any, so that a block is a contiguous run.
    """

    def __init__(self, cu_seqlens: Tensor, chunk_bytes: int):
        bounds = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        # Short sequences would be mostly padding in long chunks.
        chunk = min(CHUNK, max(16, 1 << (max(lengths) - 1).bit_length()))
        chunks = [math.ceil(n / chunk) for n in lengths]
        rows, _ = sizes(chunk_bytes, len(order), 1)
        self.blocks: list[Block] = []
        starts: dict[tuple[int, int], int] = {}
        position = saved = 0
        for first in range(0, len(order), rows):
            group = order[first : first + rows]
            states = slice(first, first + len(group))
            steps: list[tuple[int, int]] = []
            start = used = 0
            for s in range(chunks[group[0]]):
                alive = [i for i in group if chunks[i] > s]
                if steps and (used + len(alive)) * chunk_bytes > BLOCK_BYTES:
                    saved = self._close(start, used, chunk, states, steps, saved)
                    steps, start, used = [], position, 0
                if not steps:
                    start = position
                steps.append((used, len(alive)))
                for i in alive:
                    starts[i, s] = position * chunk
                    position += 1
                used += len(alive)
            saved = self._close(start, used, chunk, states, steps, saved)
        self.length = position * chunk
        device = cu_seqlens.device
        self.order = torch.tensor(order, device=device)
        runs = [
            torch.arange(starts[i, s], starts[i, s] + min(chunk, lengths[i] - s * chunk))
            for i in range(len(lengths))
            for s in range(chunks[i])
        ]
        self.where = torch.cat(runs).to(device)

    def _close(self, start: int, used: int, chunk: int, states: slice, steps: list[tuple[int, int]], saved: int) -> int:
        times = slice(start * chunk, (start + used) * chunk)
        everything, row = slice(0, None), slice(0, 1)
        block = Block(
            batch=row, time=times, chunk=chunk, region=everything, states=states, steps=tuple(steps), saved=saved
        )
        self.blocks.append(block)
        return saved + block.alive

    def pack(self, x: Tensor) -> Tensor:
        """`(1, time, ...)` -> `(1, length, ...)`; padding is zero, so that it leaves the state alone."""
        padded = x.new_zeros(1, self.length, *x.shape[2:])
        return padded.index_copy_(1, self.where, x)

    def unpack(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.where)

    def sort(self, states: Tensor) -> Tensor:
        return states.index_select(0, self.order)

    def unsort(self, states: Tensor) -> Tensor:
        return torch.empty_like(states).index_copy_(0, self.order, states)


class Scratch:
    """Named tensors that are used again in every block: they stay in the cache, and no page is touched twice."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self._options = {"dtype": dtype, "device": like.device}
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            memory = self._memory.get(name)
            if memory is None or memory.numel() < size:
                memory = self._memory[name] = torch.empty(size, **self._options)
            view = self._views[name, shape] = memory[:size].view(shape)
        return view


@lru_cache(maxsize=16)
def reversed_sum(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U with (U x)_i = Σ_{j>=i} x_j."""
    return torch.ones(size, size, dtype=dtype, device=device).triu()
