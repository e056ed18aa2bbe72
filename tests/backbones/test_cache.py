"""Caches that grow into room behind them: what was returned once never changes."""

import io
import sys
import threading

import torch

from omnimix.backbones.mixers.parts.kv_cache import appended


@torch.no_grad()
def grown(slots: int) -> torch.Tensor:
    cache = torch.zeros(1, 1, 1, 1)
    for i in range(1, slots):
        cache = appended(cache, torch.full((1, 1, 1, 1), float(i)))
    return cache


@torch.no_grad()
def test_two_that_go_on_from_one_cache_do_not_meet():
    cache = grown(4)
    first, second = (appended(cache, torch.full((1, 1, 1, 1), value)) for value in (10.0, 20.0))
    assert first.flatten().tolist() == [0, 1, 2, 3, 10] and second.flatten().tolist() == [0, 1, 2, 3, 20]


def test_nor_do_two_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            cache, found = grown(4), {}
            barrier = threading.Barrier(2)

            def go_on(value: float, cache=cache, found=found, barrier=barrier) -> None:
                with torch.no_grad():
                    new = torch.full((1, 1, 1, 1), value)
                    barrier.wait()
                    found[value] = appended(cache, new)

            threads = [threading.Thread(target=go_on, args=(value,)) for value in (10.0, 20.0)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [found[value].flatten()[-1].item() for value in (10.0, 20.0)] == [10, 20]
    finally:
        sys.setswitchinterval(interval)


def test_a_cache_is_saved_and_loaded_as_any_tensor():
    file = io.BytesIO()
    torch.save(grown(5), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).flatten().tolist() == [0, 1, 2, 3, 4]
