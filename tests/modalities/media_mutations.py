"""Damaged media files, and how much memory it takes to read them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(call: Callable[[], object]) -> int:
    """By how many bytes the memory of this process grows at most during a call, watched each millisecond."""
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        most[0] = max(most[0], resident() - before)
        done.set()
        watcher.join()
    return most[0]
