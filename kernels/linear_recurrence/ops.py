"""The custom ops of `linear_recurrence`'s backends: one schema, one autograd formula, several implementations.

With g_t the gradient of h_t from all that follows, g_t = dh_t + conj(a_{t+1}) g_{t+1}: the same recurrence the other
way round. Then dx_t = g_t and da_t = g_t conj(h_{t-1}).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.tools import launches
from ..custom import custom_op


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums."""
    return torch.promote_types(dtype, torch.float32)


def shapes(x, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor]:
    """Empty tensors for h and the final states."""
    b, t, d = x.shape
    s = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(b, t, d), x.new_empty(s, d, dtype=wide_dtype(x.dtype))


def gradient_shapes(dh, dfinal, h, a, initial_state, cu_seqlens, reverse) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients of x, a and the initial state (of no elements where there is none)."""
    dstate = h.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return h.new_empty(h.shape), a.new_empty(a.shape), dstate


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes the custom ops "omnimix::linear_recurrence_<name>" and "..._backward" and returns the backend's function.

    Args:
        name: the backend's.
        forward: takes x, a, initial_state, cu_seqlens and reverse.
        backward: takes the gradients of h and the final state, h, and the same without x.
    """

    @custom_op(f"omnimix::linear_recurrence_{name}")
    def scan(
        x: Tensor, a: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        return forward(x, a, initial_state, cu_seqlens, reverse)

    @custom_op(f"omnimix::linear_recurrence_{name}_backward")
    def scan_backward(
        dh: Tensor,
        dfinal: Tensor,
        h: Tensor,
        a: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(dh, dfinal, h, a, initial_state, cu_seqlens, reverse)

    def save(ctx, inputs, output) -> None:
        _, *tensors, ctx.reverse = inputs
        ctx.save_for_backward(output[0], *tensors)

    def differentiate(ctx, dh, dfinal):
        h, a, initial_state, cu_seqlens = ctx.saved_tensors
        # A gradient may come as a conjugated view, which custom ops must not be given.
        given = (g.resolve_conj().contiguous() for g in (dh, dfinal))
        gradients = scan_backward(*given, h, a, initial_state, cu_seqlens, ctx.reverse)
        return (*gradients[:2], None if initial_state is None else gradients[2], None, None)

    scan.register_fake(launches(forward)(shapes))
    scan_backward.register_fake(launches(backward)(gradient_shapes))
    scan.register_gradients(differentiate, save)

    def function(
        *, x: Tensor, a: Tensor, reverse: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `omnimix.kernels.linear_recurrence`."""
        state = None if initial_state is None else initial_state.resolve_conj()
        return scan(x.resolve_conj(), a.resolve_conj(), state, cu_seqlens, reverse)

    return function
