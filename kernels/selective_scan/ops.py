"""The custom ops of `selective_scan`'s backends: one schema, one autograd formula, several implementations.

The forward op also returns the states at the starts of chunks of `chunk` steps, from which the backward op begins.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..common.tools import accumulate_dtype, launches
from ..custom import custom_op

Outputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def borders_shape(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """Space for the chunks of all sequences, numbered as in `native.segments`."""
    if cu_seqlens is None:
        return batch * ((length + chunk - 1) // chunk)
    return length // chunk + cu_seqlens.shape[0] - 1


def shapes(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus, chunk) -> Outputs:
    """Empty tensors for the output, the final states (s, d, n) and the states at the boundaries (m, n, d)."""
    b, t, d = x.shape
    s = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n, wide = A.shape[1], accumulate_dtype(x.dtype)
    borders = x.new_empty(borders_shape(b, t, cu_seqlens, chunk), n, d, dtype=wide)
    return x.new_empty(b, t, d), x.new_empty(s, d, n, dtype=wide), borders


def gradient_shapes(dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state, *_) -> Gradients:
    """Empty tensors for the gradients; of no elements where there is no such argument."""

    def like(argument):
        return x.new_empty(0) if argument is None else argument.new_empty(argument.shape)

    return tuple(map(like, (x, delta, A, B, C, D, z, bias, initial_state)))


def register(
    name: str, chunk: int, forward: Callable[..., Outputs], backward: Callable[..., Gradients]
) -> Callable[..., Outputs]:
    """Makes the custom ops "omnimix::selective_scan_<name>" and "..._backward" and returns the first.

    Args:
        name: the backend's.
        chunk: steps between saved states.
        forward: takes x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens and whether to apply softplus.
        backward: takes the gradients of the output and the final state, the saved states, and the same.
    """

    @custom_op(f"omnimix::selective_scan_{name}")
    def scan(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus)

    @custom_op(f"omnimix::selective_scan_{name}_backward")
    def scan_backward(
        dy: Tensor,
        dfinal: Tensor,
        borders: Tensor,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return backward(dy, dfinal, borders, x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, softplus)

    scan.register_fake(launches(forward)(lambda *arguments: shapes(*arguments, chunk=chunk)))
    scan_backward.register_fake(launches(backward)(gradient_shapes))
    scan.register_gradients(_differentiate(scan_backward), _save)

    return scan


def by_name(scan: Callable[..., Outputs]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A custom op as a backend: it takes the public function's arguments by name."""

    def function(
        *,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `omnimix.kernels.selective_scan`."""
        y, final, _ = scan(x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus)
        return y, final

    return function


def _save(ctx: Any, inputs: tuple, output: Outputs) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(output[2], *tensors)


def _differentiate(scan_backward: Callable[..., Gradients]) -> Callable[..., tuple]:
    def differentiate(ctx, dy, dfinal, _):
        borders, *inputs = ctx.saved_tensors
        gradients = scan_backward(dy.contiguous(), dfinal.contiguous(), borders, *inputs, ctx.softplus)
        given = [None if x is None else g for x, g in zip(inputs[:-1], gradients, strict=True)]
        return (*given, None, None)

    return differentiate
