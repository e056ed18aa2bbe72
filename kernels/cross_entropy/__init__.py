"""A linear layer and the cross-entropy of its outputs in one, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnknownName, UnsupportedShape
from ..backends import backends
from ..common.checks import ANY_RANK, RANK_FROM_1, check_real, check_whole, floats, integers
from ..registry import Case, Draw, Op, register_op

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "v d"],
    target: Int[Tensor, "*rows"],
    *,
    bias: Float[Tensor, " v"] | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str = "auto",
) -> Float[Tensor, "*rows"] | Float[Tensor, ""]:
    """-log softmax(z)_target + z_loss · logsumexp(z)², with the logits z = x Wᵀ + bias, in chunks of rows.

    With `softcap` c the logits are c · tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); `z_loss` is PaLM's (arXiv
    2204.02311, section 5); with `label_smoothing` s a part s of the target is spread over all v classes (arXiv
    1512.00567, section 7).

    For "mean" and "sum" the gradients are computed in the forward pass, where they are wanted, while each chunk of
    logits is at hand: three products in all, as in the plain way. For "none" the backward pass computes the logits
    again.

    Args:
        x: any leading dimensions.
        weight: one row per class, in x's dtype.
        target: classes, int64; `ignore_index` leaves a row out.
        bias: in x's dtype.
        ignore_index: what no class is.
        z_loss: coefficient; it keeps the softmax's normaliser near 1.
        softcap: the logits' bound; None for none.
        label_smoothing: in [0, 1).
        reduction: "mean" over the rows that are not ignored (0 where all are), "sum", or "none".
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        The loss, z-loss included, in float32, or float64 where x is: a scalar, or one per row, 0 for ignored rows.

    Raises:
        UnsupportedShape: shapes, dtypes or values that do not fit, with the argument's name; on a CPU also a target
            that is no class (on a GPU its loss is NaN, or the device asserts).
        UnknownName: no such reduction.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, weight, target, bias)
    _check_options(ignore_index, z_loss, softcap, label_smoothing, reduction)
    _check(x, weight, target, bias)
    loss = OP.dispatch(
        backend,
        x=x.reshape(-1, x.shape[-1]),
        weight=weight,
        target=target.reshape(-1),
        bias=bias,
        ignore_index=ignore_index,
        z_loss=z_loss,
        softcap=softcap,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _check_options(ignore_index, z_loss, softcap, label_smoothing, reduction) -> None:
    if reduction not in REDUCTIONS:
        raise UnknownName("reduction", reduction, REDUCTIONS)
    check_whole("ignore_index", ignore_index)
    check_real("z_loss", z_loss, least=0)
    check_real("softcap", softcap, above=0, optional=True)
    check_real("label_smoothing", label_smoothing, least=0)
    if label_smoothing >= 1:
        raise UnsupportedShape(f"label_smoothing: {label_smoothing} is not in [0, 1)")


def _check(x, weight, target, bias) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} is not (classes, d) for x {tuple(x.shape)}")
    if not all(weight.shape):
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} has an empty dimension")
    if target.shape != x.shape[:-1]:
        raise UnsupportedShape(f"target: shape {tuple(target.shape)} is not x's without d, {tuple(x.shape[:-1])}")
    if target.dtype != torch.int64:
        raise UnsupportedShape(f"target: dtype {target.dtype} is not int64")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise UnsupportedShape(f"{name}: dtype {tensor.dtype} is not x's; pass {name}.to({x.dtype})")
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        raise UnsupportedShape(f"bias: shape {tuple(bias.shape)} is not {tuple(weight.shape[:1])}")


def _case(name: str, *, bias: bool = False, compiled: bool = False, bench: bool = False, **settings: Any) -> Case:
    def arguments(draw: Draw, b: int, t: int, d: int, v: int) -> dict[str, Any]:
        target = draw.integers(v, b, t)
        # Every fifth row is left out, but never the first.
        target.view(-1)[4::5] = settings.get("ignore_index", -100)
        made = {"x": draw.normal(b, t, d), "weight": draw.normal(v, d, scale=d**-0.5), "target": target}
        return made | ({"bias": draw.normal(v)} if bias else {}) | settings

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 5, 11),
        packed=False,
        compile=(lambda draw: arguments(draw, 1, 1024, 512, 50257)) if compiled else None,
        bench=(lambda draw, t: arguments(draw, 1, t, 512, 32000)) if bench else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("mean", compiled=True, bench=True),
        _case(
            "sum, all terms", bias=True, reduction="sum", z_loss=1e-2, softcap=3.0, label_smoothing=0.1, compiled=True
        ),
        _case("each row", bias=True, reduction="none", z_loss=1e-2, softcap=3.0, ignore_index=-1),
    )


def _product(arguments: Mapping[str, Any]) -> float:
    return 2.0 * arguments["x"].numel() * arguments["weight"].shape[0]


def _flops(arguments: Mapping[str, Any]) -> float:
    # The custom op also says into which of x, weight and bias it computes gradients: a product for x and for weight.
    return (1 + sum(arguments.get("into", ())[:2])) * _product(arguments)


OP = register_op(
    Op(
        name="cross_entropy",
        backends=backends("cross_entropy", "triton", "chunked", "reference"),
        sequences=(),
        cases=_cases,
        causal=False,
        flops=_flops,
        # With a loss for each row the gradients wait for the backward pass.
        parts={f"cross_entropy_{backend}_rows": _product for backend in ("chunked", "triton")},
        summary="-log softmax(x W^T + b)_target, without all logits at once",
        tensors=floats(x=RANK_FROM_1, weight=2) + integers(target=ANY_RANK) + floats(bias=1, optional=True),
    )
)
