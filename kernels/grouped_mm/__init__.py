"""One matrix product per expert over rows that are sorted by expert: what every mixture of experts stands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import floats, integers
from ..registry import Case, Draw, Op, register_op
from .routing import Route, combine, dispatch, route, scatter


def grouped_mm(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "e d f"],
    counts: Int[Tensor, " e"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "n f"]:
    """y_i = x_i W_{expert(i)}: the first counts[0] rows of x belong to expert 0, the next counts[1] to expert 1, ...

    (MegaBlocks, arXiv 2211.15841: no row is dropped and none is padded.) Rows after the last expert's belong to none:
    their output and their gradient are zero, and so is the gradient of an expert without rows. See `routing.py` for
    sorting tokens by expert, and for adding up what comes out.

    Args:
        x: rows sorted by expert, n >= 0.
        weight: one matrix per expert.
        counts: rows of each expert, int32 or int64; zeros are allowed, and they add up to at most n. They stay on the
            device: nothing waits for them, except "chunked" and "reference" on a GPU.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        The output in x's dtype, summed up in float32, or float64 where x is.

    Raises:
        UnsupportedShape: shapes or dtypes that do not fit, with the argument's name; where the counts are at hand, also
            counts that are negative or exceed n.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, weight, counts)
    _check(x, weight, counts)
    return OP.dispatch(backend, x=x, weight=weight, counts=counts)


def _check(x, weight, counts) -> None:
    if x.shape[1] != weight.shape[1]:
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} is not (experts, d, f) for x {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise UnsupportedShape(f"weight: dtype {weight.dtype} is not that of x, {x.dtype}")
    if not all(weight.shape):
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} has an empty dimension")
    if tuple(counts.shape) != weight.shape[:1]:
        raise UnsupportedShape(f"counts: shape {tuple(counts.shape)} is not {tuple(weight.shape[:1])}, one per expert")


def _flops(arguments: Mapping[str, Any]) -> float:
    return 2.0 * arguments["x"].shape[0] * arguments["weight"].shape[1] * arguments["weight"].shape[2]


def _counts(draw: Draw, rows: int, experts: int, empty: int | None, unused: float) -> Tensor:
    """Uneven shares of at most `rows` rows, none for expert `empty`, and a part `unused` for no expert."""
    if draw.device.type == "meta":
        return torch.empty(experts, device="meta", dtype=torch.int64)
    shares = torch.arange(1, experts + 1, dtype=torch.float64)
    if empty is not None:
        shares[empty] = 0
    ends = (shares.cumsum(0) / shares.sum() * (rows * (1 - unused))).round().to(torch.int64)
    return ends.diff(prepend=ends.new_zeros(1)).to(draw.device)


def _case(
    name: str,
    experts: int,
    *,
    empty: int | None = None,
    unused: float = 0.0,
    compiled: bool = False,
    bench: bool = False,
) -> Case:
    def arguments(draw: Draw, rows: int, e: int, d: int, f: int) -> dict[str, Any]:
        return {
            "x": draw.normal(rows, d),
            "weight": draw.normal(e, d, f, scale=d**-0.5),
            "counts": _counts(draw, rows, e, empty, unused),
        }

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b * t, experts, 5, 7),
        packed=False,
        compile=(lambda draw: arguments(draw, 4096, 8, 1024, 2048)) if compiled else None,
        # Two of eight experts per token, each with a hidden width of 1024, gated.
        bench=(lambda draw, t: arguments(draw, 2 * t, 8, 512, 2048)) if bench else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("uneven experts", 3, compiled=True, bench=True),
        _case("an expert without rows, rows without expert", 4, empty=1, unused=0.2),
        _case("more experts than rows", 33, empty=0),
    )


OP = register_op(
    Op(
        name="grouped_mm",
        backends=backends("grouped_mm", "triton", "chunked", "reference"),
        sequences=(),
        cases=_cases,
        causal=False,
        flops=_flops,
        summary="y_i = x_i W_{expert(i)} for rows sorted by expert",
        tensors=floats(x=2, weight=3) + integers(counts=1),
    )
)

__all__ = ["OP", "Route", "combine", "dispatch", "grouped_mm", "route", "scatter"]
