"""Rotary positions: pairs of channels, each turned by an angle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_flag, floats
from ..registry import Case, Draw, Op, register_op


def rotary(
    x: Float[Tensor, "b t h k"],
    angle: Float[Tensor, "b t r"],
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b t h k"]:
    """(x₁ + i x₂) e^{i · angle} for each of r pairs of channels (RoFormer, arXiv 2104.09864, eq. 34).

    A token's angles are its position times the pairs' frequencies (`backbones/rotary.py`), but may be anything, also
    learned; the negative angle turns back. They do not depend on the head.

    Args:
        x: queries or keys. The first 2 r channels are turned, the others (k - 2 r, none at r = k / 2) stay.
        angle: in radians; keep it in float32, in which positions up to 2²⁴ are exact.
        interleaved: whether neighbours (0, 1), (2, 3), ... are pairs (RoFormer), or halves (0, r), (1, r + 1), ...
            (GPT-NeoX, Llama).
        backend: "auto", "reference", "chunked", "native" or "triton".

    Returns:
        The output in x's dtype, computed in float32, or float64 where x is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, angle)
    check_flag("interleaved", interleaved)
    if angle.shape[:2] != x.shape[:2]:
        raise UnsupportedShape(f"angle: shape {tuple(angle.shape)} is not (b, t, pairs) for x {tuple(x.shape)}")
    if 2 * angle.shape[2] > x.shape[3]:
        raise UnsupportedShape(f"angle: {angle.shape[2]} pairs need more than x's {x.shape[3]} channels")
    if not angle.shape[2]:
        raise UnsupportedShape(f"x: there is nothing to turn in {tuple(x.shape)} by {tuple(angle.shape)} angles")
    return OP.dispatch(backend, x=x, angle=angle, interleaved=interleaved)


def _case(name: str, k: int, pairs: int, *, compiled: bool = False, bench: bool = False, **settings: Any) -> Case:
    def arguments(draw: Draw, b: int, t: int, h: int, k: int, r: int) -> dict[str, Any]:
        return {"x": draw.normal(b, t, h, k), "angle": draw.normal(b, t, r, scale=3.0)} | settings

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 3, k, pairs),
        packed=False,
        compile=(lambda draw: arguments(draw, 2, 2048, 16, 128, 64)) if compiled else None,
        bench=(lambda draw, t: arguments(draw, 1, t, 8, 64, 32)) if bench else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("halves", 6, 3, compiled=True, bench=True),
        _case("some channels in halves", 7, 2),
        _case("some channels in pairs", 7, 3, interleaved=True, compiled=True),
    )


def _traffic(arguments: Mapping[str, Any]) -> float:
    x, angle = arguments["x"], arguments["angle"]
    return 2.0 * x.numel() * x.element_size() + angle.numel() * angle.element_size()


OP = register_op(
    Op(
        name="rotary",
        backends=backends("rotary", "native", "triton", "chunked", "reference"),
        sequences=("x", "angle"),
        cases=_cases,
        traffic=_traffic,
        empty=lambda arguments: None if arguments["x"].numel() else torch.zeros_like(arguments["x"]),
        summary="(x1 + i x2) e^{i angle} for pairs of channels",
        tensors=floats(x=4, angle=3),
    )
)

__all__ = ["OP", "rotary"]
