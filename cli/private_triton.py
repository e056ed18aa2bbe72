"""What the commands use of Triton that Triton keeps private; no other file does.

`tests/cli/test_private.py` says when a release of Triton changes one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def active_driver(stand_in: Any) -> Iterator[None]:
    """Let `stand_in` be the driver that Triton compiles for; reading the public `driver.active` would ask for a GPU."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before
