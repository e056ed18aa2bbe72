"""Ops, their backends, and the choice between them.

An op is one function on tensors with one meaning and several backends. `reference` defines the meaning; the others must
agree with it, which the laws in tests/laws check for everything that is registered here.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, UnknownName
from ..utils.modes import autocast_enabled, constant_in_graphs, own_precision
from .common.checks import Argument, check_tensors
from .common.graphs import for_other_runtimes

Arguments = Mapping[str, Any]


def serves_everything(arguments: Arguments) -> None:
    """The `limits` or `refuse` of a backend that has none."""
    return None


# A module, because torch.compile looks up a module's attributes as they are; of a dictionary it keeps what it saw at
# its first look, and would not find a backend that is loaded while it traces.
_loaded = ModuleType("omnimix.kernels.loaded")


@constant_in_graphs  # an import cannot be traced; of a result only constants such as None are taken
def _load(module: str, function: str, place: str) -> None:
    if not hasattr(_loaded, place):
        setattr(_loaded, place, getattr(import_module(module, package="omnimix.kernels"), function))


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an op.

    Args:
        name: "reference", "chunked", "triton", ...
        module: the module that holds it, relative to `omnimix.kernels` (".gated_linear.chunked"); imported when first
            chosen, so that no backend costs anything before it is used.
        function: the name of the callable in that module. It takes the op's keyword arguments.
        limits: given the call's arguments, says why they are not the kind of call that this backend is for (a step
            kernel takes one step), or None where they are. `backend="auto"` passes over it without a word.
        refuse: given the arguments of a call of its kind, says why this machine cannot serve it, or None where it can.
            `backend="auto"` then falls back to the next backend: with a warning, and in strict mode not at all.
        devices: device types on which `backend="auto"` considers it; None is every device; the empty set is never.
    """

    name: str
    module: str
    function: str
    limits: Callable[[Arguments], str | None] = serves_everything
    refuse: Callable[[Arguments], str | None] = serves_everything
    devices: frozenset[str] | None = None
    _place: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", f"{self.module}_{self.function}".replace(".", "_"))

    def objection(self, arguments: Arguments) -> str | None:
        """Why this backend does not serve a call, whichever the reason; None where it does."""
        return self.limits(arguments) or self.refuse(arguments)

    def load(self) -> Callable[..., Any]:
        _load(self.module, self.function, self._place)
        return getattr(_loaded, self._place)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype that goes with a floating-point one; the narrowest is complex64."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Makes the random tensors of a `Case`, all from one generator, device and dtype."""

    generator: torch.Generator
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64

    @staticmethod
    def seeded(seed: int = 0, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64) -> Draw:
        return Draw(generator=torch.Generator().manual_seed(seed), device=torch.device(device), dtype=dtype)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=self.dtype)

    def _random(self, sampler: Callable[..., Tensor], *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(*shape, device="meta", dtype=torch.float64)
        # Drawn in float64 on the CPU, so that every dtype and device sees the same numbers.
        return sampler(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._on_device(self._random(torch.randn, *shape) * scale)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self._on_device(self._random(torch.rand, *shape) * (high - low) + low)

    def complex_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Complex numbers in the precision of `dtype`, complex64 where it has fewer than 32 bits."""
        return torch.complex(*(self._random(torch.randn, *shape) * (scale * 0.5**0.5) for _ in range(2))).to(
            device=self.device, dtype=complex_of(self.dtype)
        )

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up to, not including, `high`; int64."""
        if self.device.type == "meta":
            return torch.empty(*shape, device="meta", dtype=torch.int64)
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def log_decay(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Log decays: negative, mostly small, now and then large."""
        return self._on_device(-scale * self._random(torch.rand, *shape).pow(3) * 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One region of an op's argument space, from which the laws, `kernels check` and `kernels compile` draw calls.

    Args:
        name: what is special about it.
        make: `(draw, batch, time) -> keyword arguments`, without `initial_state`, `cu_seqlens` and `backend`. Small,
            odd sizes (K != V, heads > 1).
        state: `(draw, batch) -> initial state`, or None where the op keeps none.
        packed: whether `cu_seqlens` may be passed with these arguments.
        compile: the same arguments as `make` at the sizes that matter on a GPU, for ahead-of-time compilation and
            resource tables; None leaves the case out of it.
        bench: `(draw, time) -> keyword arguments` at the sizes of real models, for `omnimix bench kernels`; None leaves
            the case out of it.
    """

    name: str
    make: Callable[[Draw, int, int], dict[str, Any]]
    state: Callable[[Draw, int], Tensor] | None = None
    packed: bool = True
    compile: Callable[[Draw], dict[str, Any]] | None = None
    bench: Callable[[Draw, int], dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Op:
    """A registered op.

    Args:
        name: the name of the public function in `omnimix.kernels`.
        backends: in `auto`'s order of preference.
        sequences: names of the arguments whose dimensions 0 and 1 are batch and time (in calls where they have these:
            a decay of shape `(heads,)` is none); the first one always has. Empty for ops on rows without order.
        cases: returns the op's cases (a function, so that nothing is built at import).
        summary: one line, the recurrence or formula.
        tensors: what it asks of each tensor among its arguments, in the order of the public function's parameters.
        causal: whether output t depends on inputs up to t only, for all cases.
        flops: given a call's arguments, the floating-point operations of a forward pass's matrix products; None where
            these do not measure the work.
        parts: formulas like `flops` for custom ops that do only a part of the work, by name and of their arguments.
        traffic: given a call's arguments, the bytes that a forward pass must read and write at least; None where it is
            bound by its matrix products.
        empty: given a call's arguments, what it returns where there are no tokens, else None. No backend then runs.
    """

    name: str
    backends: tuple[Backend, ...]
    sequences: tuple[str, ...]
    cases: Callable[[], tuple[Case, ...]]
    summary: str
    tensors: tuple[Argument, ...] = ()
    causal: bool = True
    flops: Callable[[Arguments], float] | None = None
    parts: Mapping[str, Callable[[Arguments], float]] = field(default_factory=dict)
    traffic: Callable[[Arguments], float] | None = None
    empty: Callable[[Arguments], Tensor | tuple[Tensor, ...] | None] | None = None
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def function(self) -> Callable[..., Any]:
        """The public function, which checks its arguments and calls `dispatch`."""
        return getattr(import_module(f".{self.name}", package="omnimix.kernels"), self.name)

    def check(self, *tensors: Tensor | None) -> None:
        """Look at the tensors of a call, in the order of `self.tensors`: the door of every op, before any backend.

        Raises:
            UnsupportedShape: a rank or dtype that the op does not serve, or several devices, with the argument's name.
        """
        check_tensors(self.name, self.tensors, tensors)

    def complete(self, arguments: Arguments) -> Arguments:
        """A call's arguments with the public function's defaults, as a backend sees them."""
        parameters = [p for p in inspect.signature(self.function).parameters.values() if p.name != "backend"]
        return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(arguments)

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise UnknownName(f"backend of {self.name}", name, ["auto", *(b.name for b in self.backends)])

    def choose(self, backend: str, arguments: Arguments, device: str) -> Backend:
        """The backend that serves `arguments`, which are on `device`.

        Raises:
            UnknownName: no such backend.
            BackendUnavailable: the named backend does not serve this call; in strict mode also where `auto` would have
                to fall back from the backend preferred on this device.
        """
        if backend != "auto":
            return self._named(self.backend(backend), arguments)
        if for_other_runtimes():
            return self.backend("reference")
        if (used := self._used(arguments)) is not None:
            return self._named(used, arguments)
        passed: list[str] = []
        for candidate in self.backends:
            if candidate.devices is not None and device not in candidate.devices:
                continue
            if candidate.limits(arguments) is not None:
                continue
            reason = candidate.refuse(arguments)
            if reason is None:
                if passed:
                    self._passed_over(candidate, device, "; ".join(passed))
                return candidate
            passed.append(f"{candidate.name}: {reason}")
        raise BackendUnavailable(f"{self.name}: no backend serves this call on {device} ({'; '.join(passed)})")

    def _named(self, chosen: Backend, arguments: Arguments) -> Backend:
        if (reason := chosen.objection(arguments)) is not None:
            raise BackendUnavailable(f"{self.name}: backend {chosen.name!r} cannot serve this call: {reason}")
        return chosen

    def _used(self, arguments: Arguments) -> Backend | None:
        """The backend that `using` names, where the op has it for calls of this kind."""
        if (name := _asked_now().using) is None:
            return None
        named = (b for b in self.backends if b.name == name)
        return next((b for b in named if b.limits(arguments) is None), None)

    def _passed_over(self, chosen: Backend, device: str, reasons: str) -> None:
        message = f"{self.name}: {chosen.name!r} serves this call on {device}, because {reasons}"
        if _asked_now().strict:
            raise BackendUnavailable(f"{message} (strict mode allows only the preferred backend)")
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def dispatch(self, backend: str, **arguments: Any) -> Any:
        # The first tensor is never None.
        device = arguments[self.tensors[0].name].device.type if self.tensors else device_of(arguments)
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.dispatch(backend, **arguments)
        chosen = self.choose(backend, arguments, device)
        if self.empty is not None and (nothing := self.empty(arguments)) is not None:
            return _connected(nothing, arguments)
        run = chosen.load()
        if torch.compiler.is_compiling():
            return run(**arguments)
        try:
            return run(**arguments)
        except RuntimeError as error:
            if any(sign in str(error) for sign in _TOO_LARGE):
                raise BackendUnavailable(f"{self.name}: this call needs more memory than there is: {error}") from error
            raise

    def explain(self, arguments: Arguments) -> list[dict[str, str]]:
        """One row a backend: its name, whether `auto` takes it for this call, and why (not)."""
        arguments = self.complete(arguments)
        device = device_of(arguments)
        with own_precision(device):
            return self._rows(arguments, device)

    def _rows(self, arguments: Arguments, device: str) -> list[dict[str, str]]:
        rows, used = [], self._used(arguments)
        taken = used is not None
        for backend in self.backends:
            verdict, reason = "no", backend.objection(arguments)
            if reason is None and backend is used:
                verdict, reason = "chosen", "named by `using`"
            elif reason is None and backend.devices is not None and device not in backend.devices:
                verdict = "on request"
                reason = f"not preferred on {device}" if backend.devices else f"only when named, on {device}"
            elif reason is None and taken:
                verdict, reason = "on request", "a preferred backend serves"
            elif reason is None:
                verdict, reason, taken = "chosen", "first in order of preference", True
            rows.append({"op": self.name, "backend": backend.name, "auto": verdict, "why": reason})
        return rows


# How torch says that a CPU has no memory for a tensor, or that there can be none of that size.
_TOO_LARGE = ("can't allocate memory", "calculation overflowed", "multiplication overflow", "larger than the maximum")


@dataclass(frozen=True)
class _Asked:
    """What `strict` and `using` ask for around a call.

    Each thread has its own. torch.compile of torch 2.10 and 2.11 cannot read what threads have, but guards attributes
    of modules: while it traces, what was asked for last counts.
    """

    strict: bool = False
    using: str | None = None


_nothing = _Asked()
_asked: ContextVar[_Asked] = ContextVar("omnimix_asked", default=_nothing)
_traced: Any = ModuleType("omnimix.kernels.traced")
_traced.asked = _nothing


def _asked_now() -> _Asked:
    return _traced.asked if torch.compiler.is_compiling() else _asked.get()


@contextlib.contextmanager
def _asking(**changes: Any) -> Iterator[None]:
    before = _traced.asked
    token = _asked.set(replace(_asked.get(), **changes))
    _traced.asked = _asked.get()
    try:
        yield
    finally:
        _traced.asked = before
        _asked.reset(token)


_ops: dict[str, Op] = {}


def strict(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within it, `backend="auto"` raises where it would have to pass over the backend preferred on the device."""
    return _asking(strict=enabled)


def using(backend: str) -> contextlib.AbstractContextManager[None]:
    """Within it, `backend="auto"` is this backend wherever an op has it for the kind of call, in whole models.

    Raises:
        UnknownName: no op has a backend of this name.
    """
    known = sorted({"auto", *(b.name for op in ops() for b in op.backends)})
    if backend not in known:
        raise UnknownName("backend", backend, known)
    return _asking(using=backend)


def _connected(outputs: Any, arguments: Arguments) -> Any:
    """The outputs of a call without tokens, from which zeros flow back into every argument that asks for a gradient."""
    if not torch.is_grad_enabled():
        return outputs
    nothing = [a.flatten()[:0].sum() for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]

    def join(output: Tensor) -> Tensor:
        for zero in nothing:
            output = output + zero.to(output.dtype)
        return output

    return tuple(map(join, outputs)) if isinstance(outputs, tuple) else join(outputs)


def device_of(arguments: Arguments) -> str:
    for a in arguments.values():
        if isinstance(a, Tensor):
            return a.device.type
    return "cpu"


def register_op(op: Op) -> Op:
    if op.name in _ops:
        raise ValueError(f"an op called {op.name!r} is registered already")
    _ops[op.name] = op
    return op


def ops() -> tuple[Op, ...]:
    """Every registered op, by name."""
    return tuple(_ops[name] for name in sorted(_ops))


def get_op(name: str) -> Op:
    if name not in _ops:
        raise UnknownName("kernel op", name, _ops)
    return _ops[name]


def explain(op: str, **arguments: Any) -> list[dict[str, str]]:
    """Which backend `auto` takes for this call, and why: one row (op, backend, auto, why) a backend.

    Without arguments the op's first case at batch 1 and 16 steps on the CPU is explained. As in a call, gradients
    count: under `torch.no_grad()` a step kernel may serve that does not where a tensor requires one.
    """
    entry = get_op(op)
    if not arguments:
        arguments = entry.cases()[0].make(Draw.seeded(dtype=torch.float32), 1, 16)
    return entry.explain(arguments)
