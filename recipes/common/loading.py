"""Batches whose order and randomness follow from (seed, epoch, index) alone, so that a run resumes where it stopped."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import ConfigError, MediaError

# (epoch, index). An index below 0, -1 - i, is sample i once more: it fills up the last batch of a rank that is not to
# be left with fewer samples than others, and counts nowhere. See `own_key`.
Key = tuple[int, int]
CONTEXTS = ("fork", "forkserver", "spawn")
_MASK = (1 << 63) - 1
_END = object()


@runtime_checkable
class KeyedDataset(Protocol):
    """A dataset read by (epoch, index): what it draws at random it draws from these and its seed.

    With `__getitems__` a whole batch is read at once; its result is then the batch, unless the loader has a collate
    function.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> Any: ...


def own_key(key: Key) -> Key:
    """The key of the sample itself, also where it is there only to fill up."""
    epoch, index = key
    return (epoch, index) if index >= 0 else (epoch, -1 - index)


def mix(*numbers: int) -> int:
    """One well-spread seed from several numbers (SplitMix64, Steele et al., OOPSLA 2014), in 0 .. 2^63 - 1."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


def uniform(seed: int, keys: list[Key], draws: int) -> Tensor:
    """Uniform numbers in [0, 1), `(len(keys), draws)`: a row depends on the seed and its key, not on the batch.

    A generator a row would cost more than the augmentation itself, so the rows come from a hash of (seed, key, draw)
    in vectorised integer arithmetic.
    """
    start = torch.tensor([mix(seed, epoch, index) for epoch, index in keys], dtype=torch.int64)
    x = start[:, None] + torch.arange(1, draws + 1) * -0x61C8864680B583EB
    # int64 wraps as uint64 does; only the shifts must not drag the sign along.
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ _shift(x, 31)
    return (_shift(x, 40).to(torch.float32)) / (1 << 24)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class _EpochBatches:
    """The keys of each batch of one epoch."""

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool, rank: int, world: int):
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0

    def order(self) -> list[int]:
        short = -self.size % self.world
        if not self.shuffle:
            # The last sample: of those in order of their lengths it is the cheapest.
            return [
                *range(self.rank, self.size, self.world),
                *([-self.size] if self.rank >= self.world - short else []),
            ]
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        # For a set smaller than a batch, whose ranks need equally many samples too.
        return (order + (order * self.world)[:short])[self.rank :: self.world]

    def __len__(self) -> int:
        if not self.shuffle:
            return math.ceil(math.ceil(self.size / self.world) / self.batch_size)
        # A last batch of a few samples would be a noisy step; a set smaller than a batch is one batch. Ranks share a
        # step's samples: with twice as many of half the batch an epoch has as many steps.
        return max(1, self.size // (self.world * self.batch_size))

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.order()
        for batch in range(self.start, len(self)):
            at = batch * self.batch_size
            yield [(self.epoch, index) for index in order[at : at + self.batch_size]]


class EpochLoader:
    """A loader that Lightning resumes at any batch, with any number of workers before and after.

    Its state is (epoch, batches done): nothing of the workers needs saving, since no sample depends on them.

    Args:
        dataset: read by (epoch, index).
        batch_size: of each rank.
        seed: of the order.
        shuffle: a new order each epoch, whole batches only; otherwise every sample exactly once, in order, and ranks
            that would take fewer than others fill up with a key below 0 (see `Key`).
        workers: processes that read ahead; 0 reads in this one.
        collate: makes a batch of a list of samples.
        rank: of this process among `world` that train together.
        world: their number.
        context: how workers are started: "fork", "forkserver" or "spawn"; None is Python's default. Libraries with
            threads of their own, as for video, can hang in forked ones.
        timeout: seconds after which workers that deliver nothing are an error; 0 waits for ever.

    Raises:
        ConfigError: a number that cannot be, an unknown context, or an empty set.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        workers: int = 0,
        collate: Callable[[Any], Any] | None = None,
        rank: int = 0,
        world: int = 1,
        context: str | None = None,
        timeout: float = 0.0,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if workers < 0:
            raise ConfigError(f"workers is {workers}; it must be at least 0")
        if not 0 <= rank < world:
            raise ConfigError(f"rank is {rank}; of {world} processes it must be one of 0 to {world - 1}")
        if context not in (None, *CONTEXTS):
            raise ConfigError(f"context is {context!r}; it must be one of {', '.join(CONTEXTS)}, or null")
        if timeout < 0:
            raise ConfigError(f"timeout is {timeout}; it must be at least 0 seconds")
        if len(dataset) == 0:
            raise ConfigError("the data set is empty")
        if context == "forkserver" and workers:
            _preload(dataset)
        self.dataset = dataset
        self._batches = _EpochBatches(len(dataset), batch_size, seed, shuffle, rank, world)
        self._loader = DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]  # torch does without its base class
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=collate or _as_it_is,
            persistent_workers=workers > 0,
            # torch refuses both without workers.
            multiprocessing_context=context if workers else None,
            timeout=timeout if workers else 0,
            pin_memory=torch.cuda.is_available(),
        )
        self._done = 0
        self._resumed: tuple[int, int] | None = None

    @property
    def sampler(self) -> EpochLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    @property
    def batch_sampler(self) -> None:
        """What Lightning asks of everything that has a sampler."""
        return None

    def set_epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        # The body of a generator runs at the first `next`: Lightning calls `iter` before it says the first epoch.
        epoch, done = self._resumed or (-1, 0)
        self._resumed = None
        self._batches.start = done if epoch == self._batches.epoch and done < len(self) else 0
        self._done = self._batches.start
        batches = iter(self._loader)
        while (batch := self._next(batches)) is not _END:
            self._done += 1
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, _END)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            raise MediaError(
                f"the workers have delivered no batch for {self._loader.timeout:g} seconds; raise the timeout, or "
                "start them by the context 'forkserver'"
            ) from error

    def state_dict(self) -> dict[str, int]:
        """Where to resume: after an epoch's last batch, at the next one's first."""
        ended = self._done >= len(self)
        return {"epoch": self._batches.epoch + ended, "batches": 0 if ended else self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = (state["epoch"], state["batches"])


def _preload(dataset: KeyedDataset) -> None:
    """Let the server that workers are forked from import what they need, once for all of them.

    Each would spend seconds on it otherwise. It has an effect on servers that are not running yet.
    """
    parts = (dataset, getattr(dataset, "load", dataset))
    modules = sorted({type(part).__module__ for part in parts})
    # By default it is the main module alone.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *modules])


def _as_it_is(batch: Any) -> Any:
    return batch
