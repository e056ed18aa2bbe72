"""The custom ops of a backend of `grouped_mm`, which brings the two products."""

from collections.abc import Callable

from torch import Tensor

from ..common.tools import launches
from ..custom import custom_op

# (x, weight, counts) -> x W, row by row of its expert.
Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x, dy, counts) -> xᵀ dy over the rows of each expert, (e, d, f).
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


def backend_of(name: str, rows: Rows, weights: Weights) -> Callable[..., Tensor]:
    """The backend `name`, differentiable and known to torch.compile."""

    def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return rows(x, weight, counts)

    def backward(
        dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, into_x: bool, into_weight: bool
    ) -> tuple[Tensor, Tensor]:
        dx = rows(dy, weight.transpose(1, 2), counts) if into_x else x.new_empty(0)
        return dx, weights(x, dy, counts) if into_weight else weight.new_empty(0)

    def shapes(x, weight, counts):
        return x.new_empty(x.shape[0], weight.shape[2])

    def backward_shapes(dy, x, weight, counts, into_x, into_weight):
        return x.new_empty(x.shape if into_x else 0), weight.new_empty(weight.shape if into_weight else 0)

    def differentiate(ctx, dy):
        x, weight, counts = ctx.saved_tensors
        into_x, into_weight, _ = ctx.needs_input_grad
        dx, dweight = backward_op(dy.contiguous(), x, weight, counts, into_x, into_weight)
        return dx if into_x else None, dweight if into_weight else None, None

    op = custom_op(f"omnimix::grouped_mm_{name}", forward)
    op.register_fake(launches(forward)(shapes))
    backward_op = custom_op(f"omnimix::grouped_mm_{name}_backward", backward)
    backward_op.register_fake(launches(backward)(backward_shapes))
    op.register_gradients(differentiate, _save)

    def grouped_mm(*, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """See `omnimix.kernels.grouped_mm`."""
        return op(x, weight, counts)

    return grouped_mm


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
