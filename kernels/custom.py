"""Custom ops, which torch.compile and other tracers take for one step, and which cost eager calls nothing of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..utils.modes import own_precision

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
        self._eager: type[torch.autograd.Function] | None = None

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

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._function(*arguments)
            setup(ctx, arguments, output)
            return output

        self._op.register_autograd(outside, setup_context=setup)
        # With `setup_context` of its own, torch would look up the function's signature at every call.
        members = {"forward": forward, "backward": outside}
        name = f"{self._packet}".replace(".", "_")
        self._eager = type(name, (torch.autograd.Function,), {n: staticmethod(f) for n, f in members.items()})

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        if _heard(arguments):
            return self._packet(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self._function(*arguments)
        # An op without a formula says so itself.
        return self._packet(*arguments) if self._eager is None else self._eager.apply(*arguments)


def custom_op(name: str, function: Callable[..., Any] | None = None) -> Any:
    """`CustomOp(name, function)`; without a function a decorator."""
    return CustomOp(name, function) if function is not None else lambda function: CustomOp(name, function)


def _heard(arguments: tuple[Any, ...]) -> bool:
    """Whether a call must go through torch's dispatcher."""
    if torch.compiler.is_compiling():
        return True
    for x in arguments:
        if isinstance(x, Tensor) and (
            type(x) not in _PLAIN or not (x.is_cpu or x.is_cuda) or x.is_neg() or x.is_conj()
        ):
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
