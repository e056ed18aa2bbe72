"""Custom ops, which torch.compile and other tracers take for one step, and which cost eager calls nothing of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedCall
from ..utils.modes import observed, own_precision, transforming
from ..utils.private_torch import differentiates_forward

REMEDY = "take it of the backend 'reference': omnimix.kernels.using('reference')"
_PLAIN = (Tensor, torch.nn.Parameter)


class CustomOp:
    """A function as a custom op of torch's.

    Whoever listens to torch's dispatcher (a compiler, tracer or mode, a transform of torch.func, a forward derivative,
    a class of tensors, fake or meta tensors) meets the op. A plain eager call runs the function itself, within an
    autograd.Function where a gradient is asked for: the dispatcher's way through Python takes longer than many a
    kernel.

    Args:
        name: "omnimix::name".
        function: gives new tensors that share no memory with its arguments; its annotations are the op's schema.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self._function = function
        self._op = torch.library.custom_op(name, function, mutates_args=())
        self._packet = getattr(torch.ops.omnimix, name.partition("::")[2])

        def refuse(ctx: Any, *gradients: Tensor | None) -> Any:
            raise UnsupportedCall(f"{self._packet} has no derivative; {REMEDY}")

        # What has no derivative says so, by whichever way it is reached.
        self._op.register_autograd(refuse)
        self._eager, self._transformed = self._functions(refuse, lambda ctx, inputs, output: None)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What the op gives for fake and meta tensors: empty tensors."""
        return self._op.register_fake(fake)

    def register_gradients(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        """Give the op its backward pass, which runs outside autocast as the op does, wherever it is called.

        Args:
            backward: `(ctx, *gradients) -> gradients of the arguments`.
            setup: `(ctx, inputs, output)`, saves what `backward` needs.
        """

        def outside(ctx: Any, *gradients: Tensor | None) -> Any:
            device = next((g.device.type for g in gradients if g is not None), "cpu")
            with own_precision(device):
                return backward(ctx, *gradients)

        self._op.register_autograd(outside, setup_context=setup)
        self._eager, self._transformed = self._functions(outside, setup)

    def _functions(self, backward: Callable[..., Any], setup: Callable[..., None]) -> tuple[Any, ...]:
        """Two autograd.Functions: for plain eager calls, and for the transforms of torch.func."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._function(*arguments)
            setup(ctx, arguments, output)
            return output

        def tangents(ctx: Any, *arguments: Any) -> Any:
            raise UnsupportedCall(f"{self._packet} has no forward derivative; {REMEDY}")

        # A transform differentiates the call within it, which may be transformed once more.
        inner = {"forward": lambda *arguments: self(*arguments), "setup_context": setup, "vmap": self._one_by_one}
        # With `setup_context` of its own, torch would look up the function's signature at every eager call.
        kinds = ({"forward": forward}, inner | {"jvp": tangents})
        name = f"{self._packet}".replace(".", "_")
        made = [{n: staticmethod(f) for n, f in (kind | {"backward": backward}).items()} for kind in kinds]
        return tuple(type(name, (torch.autograd.Function,), members) for members in made)

    def _one_by_one(self, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        """torch.vmap: the calls one after another, their results stacked."""
        pairs = list(zip(arguments, dims, strict=True))
        if not info.batch_size:
            # Of no calls the results have shapes too: those of one call on zeros, which is not kept.
            pairs = [
                (x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :]) if isinstance(dim, int) else x, dim)
                for x, dim in pairs
            ]
        # A list of numbers has a list of dimensions, all of them None.
        rows = [
            self(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))
            for i in range(max(1, info.batch_size))
        ]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(row)[: info.batch_size] for row in zip(*rows, strict=True)), (0,) * len(rows[0])
        return torch.stack(rows)[: info.batch_size], 0

    def __call__(self, *arguments: Any) -> Any:
        """Give the function's result, by the way that the call needs."""
        if _heard(arguments):
            # The op's own autograd has no rules for torch.func.
            return self._transformed.apply(*arguments) if transforming() else self._packet(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self._function(*arguments)
        return self._eager.apply(*arguments)


def custom_op(name: str, function: Callable[..., Any] | None = None) -> Any:
    """`CustomOp(name, function)`; without a function a decorator."""
    return CustomOp(name, function) if function is not None else lambda function: CustomOp(name, function)


def _heard(arguments: tuple[Any, ...]) -> bool:
    """Whether a call must go through torch's dispatcher."""
    if observed() or differentiates_forward():
        return True
    for x in arguments:
        if isinstance(x, Tensor) and (
            type(x) not in _PLAIN or not (x.is_cpu or x.is_cuda) or x.is_neg() or x.is_conj()
        ):
            return True
    return False
