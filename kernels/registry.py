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
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, UnknownName
from ..utils.modes import constant_in_graphs, own_precision

Arguments = Mapping[str, Any]


def serves_everything(arguments: Arguments) -> None:
    """The `refuse` of a backend that has no limits."""
    return None


# A module, because torch.compile looks up a module's attributes as they are; of a dictionary it keeps what it saw at
# its first look, and would not find a backend that is loaded while it traces.
_loaded = ModuleType("omnimix.kernels.loaded")


def _place(module: str, function: str) -> str:
    return f"{module}_{function}".replace(".", "_")


@constant_in_graphs  # an import cannot be traced; of a result only constants such as None are taken
def _load(module: str, function: str) -> None:
    if not hasattr(_loaded, _place(module, function)):
        setattr(_loaded, _place(module, function), getattr(import_module(module, package="omnimix.kernels"), function))


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an op.

    Args:
        name: "reference", "chunked", "triton", ...
        module: the module that holds it, relative to `omnimix.kernels` (".gated_linear.chunked"); imported when first
            chosen, so that no backend costs anything before it is used.
        function: the name of the callable in that module. It takes the op's keyword arguments.
        refuse: given the call's arguments, says why this backend cannot serve them, or None where it can.
        devices: device types on which `backend="auto"` considers it; None is every device; the empty set is never.
    """

    name: str
    module: str
    function: str
    refuse: Callable[[Arguments], str | None] = serves_everything
    devices: frozenset[str] | None = None

    def load(self) -> Callable[..., Any]:
        _load(self.module, self.function)
        return getattr(_loaded, _place(self.module, self.function))


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
        causal: whether output t depends on inputs up to t only, for all cases.
        flops: given a call's arguments, the floating-point operations of a forward pass's matrix products; None where
            these do not measure the work.
        parts: formulas like `flops` for custom ops that do only a part of the work, by name and of their arguments.
        traffic: given a call's arguments, the bytes that a forward pass must read and write at least; None where it is
            bound by its matrix products.
    """

    name: str
    backends: tuple[Backend, ...]
    sequences: tuple[str, ...]
    cases: Callable[[], tuple[Case, ...]]
    summary: str
    causal: bool = True
    flops: Callable[[Arguments], float] | None = None
    parts: Mapping[str, Callable[[Arguments], float]] = field(default_factory=dict)
    traffic: Callable[[Arguments], float] | None = None
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def function(self) -> Callable[..., Any]:
        """The public function, which checks its arguments and calls `dispatch`."""
        return getattr(import_module(f".{self.name}", package="omnimix.kernels"), self.name)

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise UnknownName(f"backend of {self.name}", name, ["auto", *(b.name for b in self.backends)])

    def choose(self, backend: str, arguments: Arguments) -> Backend:
        """The backend that serves `arguments`.

        Raises:
            UnknownName: no such backend.
            BackendUnavailable: the named backend refuses this call; in strict mode also where `auto` would have to
                pass over the backend preferred on this device.
        """
        if backend != "auto":
            chosen = self.backend(backend)
            if reason := chosen.refuse(arguments):
                raise BackendUnavailable(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
            return chosen
        if (named := _using.get()) in (b.name for b in self.backends):
            return self.choose(named, arguments)
        device = device_of(arguments)
        passed: list[str] = []
        for candidate in self.backends:
            if candidate.devices is not None and device not in candidate.devices:
                continue
            reason = candidate.refuse(arguments)
            if reason is None:
                if passed:
                    self._passed_over(candidate, device, "; ".join(passed))
                return candidate
            passed.append(f"{candidate.name}: {reason}")
        raise BackendUnavailable(f"{self.name}: no backend serves this call on {device} ({'; '.join(passed)})")

    def _passed_over(self, chosen: Backend, device: str, reasons: str) -> None:
        message = f"{self.name}: {chosen.name!r} serves this call on {device}, because {reasons}"
        if _strict.get():
            raise BackendUnavailable(f"{message} (strict mode allows only the preferred backend)")
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def dispatch(self, backend: str, **arguments: Any) -> Any:
        with own_precision(device_of(arguments)):
            return self.choose(backend, arguments).load()(**arguments)

    def explain(self, arguments: Arguments) -> list[dict[str, str]]:
        """One row a backend: its name, whether `auto` takes it for this call, and why (not)."""
        # A backend looks at the arguments as the public function passes them on, with its defaults.
        parameters = inspect.signature(self.function).parameters.values()
        arguments = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(arguments)
        device = device_of(arguments)
        rows, taken = [], False
        for backend in self.backends:
            reason = backend.refuse(arguments)
            if reason is None and backend.devices is not None and device not in backend.devices:
                reason = f"only when named, on {device}" if not backend.devices else f"not preferred on {device}"
                verdict = "on request"
            elif reason is not None:
                verdict = "no"
            elif taken:
                verdict, reason = "on request", "a preferred backend serves"
            else:
                verdict, reason, taken = "chosen", "first in order of preference", True
            rows.append({"op": self.name, "backend": backend.name, "auto": verdict, "why": reason})
        return rows


_strict: ContextVar[bool] = ContextVar("omnimix_strict", default=False)
_using: ContextVar[str | None] = ContextVar("omnimix_using", default=None)
_ops: dict[str, Op] = {}


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within it, `backend="auto"` raises where it would have to pass over the backend preferred on the device."""
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Within it, `backend="auto"` is this backend in every op that has it, so that whole models run on it."""
    token = _using.set(backend)
    try:
        yield
    finally:
        _using.reset(token)


def register_gradients(op: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give a custom op its backward pass, which runs outside autocast as the op does, wherever it is called."""

    def outside(ctx: Any, *gradients: Tensor | None) -> Any:
        device = next((g.device.type for g in gradients if g is not None), "cpu")
        with own_precision(device):
            return backward(ctx, *gradients)

    op.register_autograd(outside, setup_context=setup)


def named() -> str | None:
    """The backend that `using` names here."""
    return _using.get()


def device_of(arguments: Arguments) -> str:
    return next((a.device.type for a in arguments.values() if isinstance(a, Tensor)), "cpu")


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

    Without arguments the op's first case at batch 1 and 16 steps on the CPU is explained.
    """
    entry = get_op(op)
    if not arguments:
        arguments = entry.cases()[0].make(Draw.seeded(dtype=torch.float32), 1, 16)
    return entry.explain(arguments)
