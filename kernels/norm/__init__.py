"""RMSNorm, plain or gated, whole or in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import UnknownName, UnsupportedShape
from ..backends import backends
from ..common.checks import RANK_FROM_1, check_flag, check_real, check_whole, floats
from ..common.tools import triton_refusal
from ..registry import Case, Draw, Op, register_op

# Channels of the widest slice that a Triton program holds.
WIDEST = 8192


def norm(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"] | None = None,
    *,
    gate: Float[Tensor, "*rows d"] | None = None,
    gate_activation: Literal["silu", "sigmoid"] = "silu",
    norm_before_gate: bool = True,
    groups: int = 1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Float[Tensor, "*rows d"]:
    """y = weight · x / √(mean(x²) + eps) over each of `groups` equal slices of d (RMSNorm, arXiv 1910.07467).

    With a gate: norm(x) · act(gate) (GLA, arXiv 2312.06635), or norm(x · act(gate)) where `norm_before_gate` is False
    (Mamba-2, arXiv 2405.21060).

    Args:
        x: any leading dimensions.
        weight: None for all ones.
        gate: of x's shape.
        gate_activation: "silu" or "sigmoid".
        norm_before_gate: whether the gate multiplies the normalised x, or x.
        groups: divides d.
        eps: keeps rows of zeros finite.
        backend: "auto", "reference", "chunked", "native" or "triton".

    Returns:
        The output in x's dtype. Statistics are taken in float32, or float64 where x is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, weight, gate)
    _check(x, weight, gate, gate_activation, groups, eps, norm_before_gate)
    return OP.dispatch(
        backend,
        x=x,
        weight=weight,
        gate=gate,
        gate_activation=gate_activation,
        norm_before_gate=norm_before_gate,
        groups=groups,
        eps=eps,
    )


def _check(x, weight, gate, gate_activation, groups, eps, before) -> None:
    check_whole("groups", groups, least=1)
    check_real("eps", eps, least=0)
    check_flag("norm_before_gate", before)
    if x.shape[-1] < 1:
        raise UnsupportedShape(f"x: shape {tuple(x.shape)} has no channels to normalise")
    d = x.shape[-1]
    if weight is not None and tuple(weight.shape) != (d,):
        raise UnsupportedShape(f"weight: shape {tuple(weight.shape)} is not {(d,)}")
    if gate is not None and gate.shape != x.shape:
        raise UnsupportedShape(f"gate: shape {tuple(gate.shape)} is not that of x, {tuple(x.shape)}")
    if gate_activation not in ("silu", "sigmoid"):
        raise UnknownName("gate activation", gate_activation, ["silu", "sigmoid"])
    if d % groups:
        raise UnsupportedShape(f"groups: {groups} does not divide x's {d} channels")


def _case(
    name: str,
    gated: bool = False,
    weight: bool = True,
    heads: int | None = None,
    compiled: int | None = None,
    typical: int | None = None,
    **settings,
) -> Case:
    """`compiled` and `typical` are the widths at which it is compiled ahead of time and timed."""

    def arguments(draw: Draw, b: int, t: int, d: int):
        shape = (b, t, d) if heads is None else (b, t, heads, d)
        made = {"x": draw.normal(*shape), "weight": draw.normal(d) if weight else None, **settings}
        return made | ({"gate": draw.normal(*shape)} if gated else {})

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 6),
        packed=False,
        compile=None if compiled is None else lambda draw: arguments(draw, 2, 1024, compiled),
        bench=None if typical is None else lambda draw, t: arguments(draw, 1, t, typical),
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("plain", compiled=1536, typical=768),
        _case("no weight", weight=False),
        _case("per head", heads=3),
        _case("groups", groups=2, eps=1e-3),
        _case("gated", gated=True, heads=2, compiled=128),
        _case("gated by sigmoid", gated=True, gate_activation="sigmoid", groups=3),
        _case("gate first", gated=True, norm_before_gate=False, compiled=8192, typical=1536),
        _case("gate first, groups, no weight", gated=True, norm_before_gate=False, groups=2, weight=False),
    )


def _traffic(arguments: Mapping[str, Any]) -> float:
    """x and the gate are read, y is written."""
    x = arguments["x"]
    return x.numel() * x.element_size() * (2 if arguments.get("gate") is None else 3)


def _refuse(arguments: Mapping[str, Any]) -> str | None:
    if reason := triton_refusal(arguments):
        return reason
    width = arguments["x"].shape[-1] // arguments["groups"]
    return f"slices of {width} channels exceed the {WIDEST} that fit into registers" if width > WIDEST else None


OP = register_op(
    Op(
        name="norm",
        backends=backends("norm", "triton", "native", "chunked", "reference", triton=_refuse),
        sequences=("x", "gate"),
        cases=_cases,
        traffic=_traffic,
        empty=lambda arguments: None if arguments["x"].numel() else torch.zeros_like(arguments["x"]),
        summary="y = weight x / sqrt(mean(x^2) + eps), times act(gate) before or after",
        tensors=floats(x=RANK_FROM_1) + floats(weight=1, gate=RANK_FROM_1, optional=True),
    )
)
