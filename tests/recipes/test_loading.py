"""Batches that follow from (seed, epoch, index)."""

import itertools
import os
import signal
import time

import pytest
import torch

from omnimix.errors import ConfigError, LostProcess, MediaError
from omnimix.recipes.common.loading import EpochLoader, mix, own_key, uniform
from omnimix.recipes.common.ranks import losses_named


class Keys:
    """A data set that returns the keys that it is asked for."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key):
        return key


def epochs(loader: EpochLoader, *numbers: int) -> list:
    seen = []
    for epoch in numbers:
        loader.set_epoch(epoch)
        seen.append(list(loader))
    return seen


def test_mix_spreads():
    seeds = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_uniform_depends_on_the_key_and_not_on_the_batch():
    keys = [(epoch, index) for epoch in range(10) for index in range(500)]
    numbers = uniform(3, keys, 4)
    assert torch.equal(numbers[7:9], uniform(3, keys[7:9], 4))
    assert not torch.equal(numbers, uniform(4, keys, 4))
    assert 0 <= numbers.min() and numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.full((4,), 0.5), atol=0.01)
    assert torch.allclose(numbers.var(0), torch.full((4,), 1 / 12), atol=0.003)
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 0.05


def test_each_epoch_is_another_order_of_whole_batches():
    first, second, again = epochs(EpochLoader(Keys(23), batch_size=5, shuffle=True, seed=1), 0, 1, 0)
    assert first == again and [k[1] for b in first for k in b] != [k[1] for b in second for k in b]
    for number, epoch in enumerate((first, second)):
        keys = list(itertools.chain(*epoch))
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5]
        assert len({index for _, index in keys}) == 20 and {e for e, _ in keys} == {number}


def test_without_shuffling_every_sample_comes_once_in_order():
    [seen] = epochs(EpochLoader(Keys(23), batch_size=5), 0)
    assert [index for batch in seen for _, index in batch] == list(range(23))


@pytest.mark.parametrize("size", [1, 5, 16, 23])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_take_equally_many_steps_of_equally_many_samples(size, shuffle):
    loaders = [EpochLoader(Keys(size), batch_size=4, shuffle=shuffle, rank=r, world=3) for r in range(3)]
    sizes = {tuple(len(batch) for batch in epochs(loader, 2)[0]) for loader in loaders}
    assert len(sizes) == 1 and len(sizes.pop()) == len(loaders[0])


@pytest.mark.parametrize("size", [1, 5, 16, 23])
def test_ranks_share_held_out_samples_and_mark_what_fills_up(size):
    held = [EpochLoader(Keys(size), batch_size=4, rank=r, world=3) for r in range(3)]
    seen = [key for loader in held for batch in epochs(loader, 1)[0] for key in batch]
    assert sorted(index for _, index in seen if index >= 0) == list(range(size))
    filling = [key for key in seen if key[1] < 0]
    assert len(filling) == -size % 3 and {own_key(key) for key in filling} <= {(1, size - 1)}
    assert own_key((4, 7)) == (4, 7)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_resumes_at_any_batch_with_any_number_of_workers(before, after):
    options = {"batch_size": 4, "shuffle": True, "seed": 5}
    whole = epochs(EpochLoader(Keys(30), **options), 3, 4)
    stopped = EpochLoader(Keys(30), **options, workers=before)
    stopped.set_epoch(3)
    iterator = iter(stopped)
    done = [next(iterator) for _ in range(3)]
    state = stopped.state_dict()

    resumed = EpochLoader(Keys(30), **options, workers=after)
    resumed.load_state_dict(state)
    # Lightning calls iter before it says which epoch it is.
    early = iter(resumed)
    resumed.set_epoch(3)
    assert done + list(early) == whole[0]
    resumed.set_epoch(4)
    assert list(resumed) == whole[1]


def test_resumes_after_the_last_batch_with_the_next_epoch():
    loader = EpochLoader(Keys(8), batch_size=4, shuffle=True)
    [_, second] = epochs(loader, 0, 1)
    fresh = EpochLoader(Keys(8), batch_size=4, shuffle=True)
    iterator = iter(loader)
    loader.set_epoch(0)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    fresh.load_state_dict(state)
    assert state["epoch"] == 1 and epochs(fresh, 1) == [second]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 2, "workers": -1},
        {"batch_size": 2, "world": 2, "rank": 2},
        {"batch_size": 2, "context": "thread"},
        {"batch_size": 2, "timeout": -1.0},
    ],
)
def test_impossible_values_raise(wrong):
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        EpochLoader(Keys(8), **wrong)


def test_workers_that_hang_are_an_error():
    class Hangs(Keys):
        def __getitem__(self, key):
            time.sleep(3)

    loader = EpochLoader(Hangs(8), batch_size=2, workers=1, context="fork", timeout=1.0)
    with pytest.raises(MediaError, match="1 seconds"):
        next(iter(loader))


def test_an_empty_set_raises():
    with pytest.raises(ConfigError, match="empty"):
        EpochLoader(Keys(0), batch_size=2)


class Dying(Keys):
    """Ends the process that reads it, as a system does that has no memory left."""

    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_ends_is_named():
    loader = EpochLoader(Dying(4), batch_size=2, workers=1)
    with pytest.raises(LostProcess, match="a process that reads ahead has ended"), losses_named():
        epochs(loader, 0)
