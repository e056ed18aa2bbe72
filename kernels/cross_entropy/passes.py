"""What the chunked and the Triton backend share: the walk over chunks of rows, and its custom ops.

A backend is a function that makes, of a chunk of logits, the rows' losses and the gradient with respect to the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedCall, UnsupportedShape
from ..common.tools import accumulate_dtype, launches
from ..custom import REMEDY, custom_op

# Logits in a chunk: enough rows for the products to run at full speed, few enough to be a small part of the memory.
ELEMENTS = {"cpu": 2**23}
ELEMENTS_ELSEWHERE = 2**26
FEWEST_ROWS = 16


class Terms(NamedTuple):
    """The loss's terms as plain numbers; softcap 0 is none."""

    ignore_index: int
    z_loss: float
    softcap: float
    smoothing: float


# (logits, target, upstream, terms, dtype or None) -> (losses, gradient in that dtype, or nothing). The logits are
# overwritten. `upstream`, the gradient with respect to each row's loss, is 0 where a row is ignored.
Softmax = Callable[[Tensor, Tensor, Tensor, Terms, torch.dtype | None], tuple[Tensor, Tensor | None]]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed up and given in float32 or wider."""
    if a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """On a CPU, where it costs no wait."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise UnsupportedShape(
            f"target: {target[wrong][0].item()} is none of {classes} classes, nor ignore_index, {ignore_index}"
        )


def _walk(
    softmax: Softmax,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    terms: Terms,
    into: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every row's loss, and the gradients that `into` asks for, else empty: of x, in its dtype; of weight and bias."""
    classes, wide, device = weight.shape[0], accumulate_dtype(x.dtype), x.device
    _check_target(target, classes, terms.ignore_index)
    narrow = x.dtype
    if device.type not in ("cuda", "meta"):
        # Only there do products of half precision come out in float32.
        x, weight = x.to(wide), weight.to(wide)
    losses = torch.empty(x.shape[0], dtype=wide, device=device)
    # None only where nothing wants it.
    g: Any
    dx = torch.empty(x.shape if into[0] else 0, dtype=narrow, device=device)
    dweight = torch.zeros(weight.shape if into[1] else 0, dtype=wide, device=device)
    dbias = torch.zeros(classes if into[2] else 0, dtype=wide, device=device)
    step = max(FEWEST_ROWS, ELEMENTS.get(device.type, ELEMENTS_ELSEWHERE) // classes)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        logits = _multiply(x[rows], weight.t())
        if bias is not None:
            logits += bias
        losses[rows], g = softmax(logits, target[rows], upstream[rows], terms, x.dtype if any(into) else None)
        # Freed before the next chunk's are made.
        del logits
        if into[0]:
            dx[rows] = _multiply(g, weight)
        if into[1] and g.dtype == wide:
            dweight.addmm_(g.t(), x[rows])
        elif into[1]:
            dweight += _multiply(g.t(), x[rows])
        if into[2]:
            dbias += g.sum(0, dtype=wide)
        del g
    return losses, dx, dweight, dbias


def backend_of(name: str, softmax: Softmax) -> Callable[..., Tensor]:
    """The backend that stands on `softmax`; its custom ops are called `omnimix::cross_entropy_<name>...`."""
    reduced, rows = _reduced_op(name, softmax), _rows_op(name, softmax)

    def cross_entropy(*, x, weight, target, bias, ignore_index, z_loss, softcap, label_smoothing, reduction) -> Tensor:
        """See `omnimix.kernels.cross_entropy`."""
        common = (x, weight, bias, target, ignore_index, z_loss, softcap or 0.0, label_smoothing)
        if reduction == "none":
            return rows(*common)
        wanted = [torch.is_grad_enabled() and a is not None and a.requires_grad for a in (x, weight, bias)]
        return reduced(*common, reduction == "mean", wanted)[0]

    return cross_entropy


def _share(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """1 for each row that counts, else 0."""
    return (target != ignore_index).to(accumulate_dtype(x.dtype))


def _op(name: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    op = custom_op(f"omnimix::cross_entropy_{name}", function)
    op.register_fake(launches(function)(shapes))
    return op


def _reduced_op(name: str, softmax: Softmax) -> Any:
    """The mean or sum over the rows: the loss, the factor that makes it of the sum, and the sum's gradients.

    The factor is left to the backward pass, where it meets the loss's own: a mean's gradients are too small for
    float16, and a gradient scaler acts on the loss.
    """

    def reduce(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        smoothing: float,
        mean: bool,
        into: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        share = _share(x, target, ignore_index)
        factor = 1 / share.sum().clamp_min(1) if mean else share.new_ones(())
        terms = Terms(ignore_index, z_loss, softcap, smoothing)
        losses, dx, dweight, dbias = _walk(softmax, x, weight, bias, target, share, terms, into)
        return (losses * share).sum() * factor, factor, dx, dweight, dbias

    def shapes(x, weight, bias, target, ignore_index, z_loss, softcap, smoothing, mean, into):
        wide = accumulate_dtype(x.dtype)
        dx, dweight, dbias = _gradients(x, weight, into)
        return x.new_empty((), dtype=wide), x.new_empty((), dtype=wide), dx, dweight.to(wide), dbias.to(wide)

    op = _op(name, reduce, shapes)
    op.register_gradients(_scale, _save_gradients)
    return op


def _rows_op(name: str, softmax: Softmax) -> Any:
    """The loss of each row."""

    def rows(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        smoothing: float,
    ) -> Tensor:
        share = _share(x, target, ignore_index)
        terms = Terms(ignore_index, z_loss, softcap, smoothing)
        return _walk(softmax, x, weight, bias, target, share, terms, [False] * 3)[0] * share

    def shapes(x, weight, bias, target, ignore_index, z_loss, softcap, smoothing):
        return x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype))

    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        smoothing: float,
        into: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms = Terms(ignore_index, z_loss, softcap, smoothing)
        upstream = torch.where(target != ignore_index, dy, 0)
        _, dx, dweight, dbias = _walk(softmax, x, weight, bias, target, upstream, terms, into)
        return dx, dweight.to(x.dtype), dbias.to(x.dtype)

    def backward_shapes(dy, x, weight, bias, target, ignore_index, z_loss, softcap, smoothing, into):
        return _gradients(x, weight, into)

    op = _op(f"{name}_rows", rows, shapes)
    backward_op = _op(f"{name}_rows_backward", backward, backward_shapes)
    op.register_gradients(partial(_differentiate_rows, backward_op), _save_inputs)
    return op


def _gradients(x: Tensor, weight: Tensor, into: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the gradients' shapes and dtypes."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, into, strict=True))
    return dx, dweight, dbias


def _save_gradients(ctx, inputs, output) -> None:
    ctx.into, ctx.dtype = inputs[-1], inputs[0].dtype
    # They stay differentiable, so that a second derivative comes back here, where it is refused.
    ctx.save_for_backward(*output[1:])
    # The gradients' gradients would be zeros of the weight's size.
    ctx.set_materialize_grads(False)


def _scale(ctx, dloss, *second):
    if any(g is not None for g in second):
        raise UnsupportedCall(f"omnimix.cross_entropy's gradients have no derivative; {REMEDY}")
    if dloss is None:
        return (None,) * 10
    factor, *gradients = ctx.saved_tensors
    factor = factor * dloss
    dx, dweight, dbias = (
        (g.to(factor.dtype) * factor).to(ctx.dtype) if wanted else None
        for g, wanted in zip(gradients, ctx.into, strict=True)
    )
    return dx, dweight, dbias, *[None] * 7


def _save_inputs(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _differentiate_rows(backward_op, ctx, dy):
    x, weight, bias, target = ctx.saved_tensors
    into = list(ctx.needs_input_grad[:3])
    made = backward_op(dy.contiguous(), x, weight, bias, target, *ctx.settings, into)
    dx, dweight, dbias = (g if wanted else None for g, wanted in zip(made, into, strict=True))
    return dx, dweight, dbias, *[None] * 5
