"""The custom ops of `short_conv`'s CPU backends: one schema, one autograd formula, several implementations."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..custom import custom_op

Outputs = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def shapes(x, weight, bias, initial_state, cu_seqlens, silu) -> Outputs:
    """Empty tensors for the output and the final state."""
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n, x.shape[2], weight.shape[1] - 1)


def gradient_shapes(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu) -> Gradients:
    """Empty tensors for the gradients of x, weight, bias and the initial state."""
    state = x if initial_state is None else initial_state
    dbias = weight.new_empty(weight.shape[0]) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, state.new_empty(dfinal.shape)


def register(name: str, forward: Callable[..., Outputs], backward: Callable[..., Gradients]) -> Callable[..., Outputs]:
    """Makes the custom ops "omnimix::short_conv_<name>" and "..._backward" and returns the first.

    Args:
        name: the backend's.
        forward: takes x, weight, bias, initial_state, cu_seqlens and whether silu is applied.
        backward: takes the gradients of the output and the final state, and the same.
    """

    @custom_op(f"omnimix::short_conv_{name}")
    def convolve(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        return forward(x, weight, bias, initial_state, cu_seqlens, silu)

    convolve.register_fake(shapes)

    @custom_op(f"omnimix::short_conv_{name}_backward")
    def differentiate(
        dy: Tensor,
        dfinal: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)

    differentiate.register_fake(gradient_shapes)

    def save(ctx, inputs, output) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, dy, dfinal):
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        y, final = shapes(x, weight, bias, initial_state, cu_seqlens, ctx.silu)
        dy = torch.zeros_like(y) if dy is None else dy.contiguous()
        dfinal = torch.zeros_like(final) if dfinal is None else dfinal.contiguous()
        dx, dweight, dbias, dstate = differentiate(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, ctx.silu)
        return dx, dweight, None if bias is None else dbias, None if initial_state is None else dstate, None, None

    convolve.register_gradients(gradients, save)
    return convolve
