"""Law 10: which backend ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from omnimix.kernels import native, ops
from omnimix.kernels.common.tools import triton_refusal


class Ran:
    """Records the files of an op's backends whose functions run within it, and its calls of C++ and Triton.

    Everything is seen that runs in Python on this thread: custom ops, and on CPUs their backward passes too.

    Args:
        op: the op's name; None for every op, whose backends are then in `seen`.
    """

    NAMES = frozenset({"reference", "chunked", "native", "triton"})

    def __init__(self, op: str | None):
        self._folder, self._native, self._op = f"{os.sep}kernels{os.sep}", native.__file__, op
        self.seen: set[tuple[str, str]] = set()
        self.cpp_calls = self.launches = 0
        self._grids: Any = None

    def __enter__(self) -> Ran:
        # Without triton nothing is launched.
        if triton_refusal({}) is None:
            self._count_launches()
        sys.setprofile(self._see)
        return self

    def _count_launches(self) -> None:
        from triton.runtime import interpreter

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            # The interpreter runs thousands of functions, none of which decides on anything.
            sys.setprofile(None)
            try:
                return run(executor, *args, **kwargs)
            finally:
                sys.setprofile(self._see)

        run, self._grids = interpreter.GridExecutor.__call__, interpreter.GridExecutor
        self._run = run
        self._grids.__call__ = launch

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        if self._grids is not None:
            self._grids.__call__ = self._run

    def _see(self, frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file == self._native and frame.f_code.co_name == "call":
            self.cpp_calls += 1
        folder, _, name = file.rpartition(self._folder)
        op, _, backend = name.removesuffix(".py").partition(os.sep)
        if folder and backend in self.NAMES and frame.f_code.co_name != "<module>":
            self.seen.add((op, backend))

    @property
    def backends(self) -> set[str]:
        """Those of the op that ran."""
        return {backend for op, backend in self.seen if op == self._op}


def runs(op: str, backend: str, call: Callable[[], Any]) -> None:
    """Law 10: a call runs the backend that is named, and no other of the op's: C++ and Triton are really called."""
    with Ran(op) as ran:
        call()
    assert ran.backends == {backend}, f"{op}: {sorted(ran.backends)} ran, not {backend!r}"
    assert bool(ran.cpp_calls) == (backend == "native"), f"{op}: {ran.cpp_calls} calls of C++ by {backend!r}"
    assert bool(ran.launches) == (backend == "triton"), f"{op}: {ran.launches} launches of Triton by {backend!r}"


def runs_on_triton(call: Callable[[], Any]) -> None:
    """Law 10: within a call every op that has a Triton backend runs it, and no other in its place."""
    with Ran(None) as ran:
        call()
    able = {op.name for op in ops() if "triton" in [b.name for b in op.backends]}
    elsewhere = {(op, backend) for op, backend in ran.seen if op in able and backend not in ("triton", "reference")}
    assert not elsewhere, f"not on Triton: {sorted(elsewhere)}"
    assert ran.launches or not able & {op for op, _ in ran.seen}, "no Triton kernel was launched"
