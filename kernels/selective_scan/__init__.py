"""Mamba's selective scan: a diagonal linear system whose step size, input and output depend on the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_flag, check_state, floats, integers, untouched
from ..common.tools import accumulate_dtype, triton_refusal
from ..registry import Case, Draw, Op, register_op

# Of one channel, in one Triton program.
MOST_STATES = 128


def selective_scan(
    x: Float[Tensor, "b t d"],
    delta: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b t d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "s d n"] | None = None,
    cu_seqlens: Int[Tensor, " s_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "s d n"]]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t,  y_t = (C_t · h_t + D x_t) · silu(z_t)  (Mamba, arXiv 2312.00752, eq. 2).

    Each of the d channels has a state of n numbers. The input's step is Euler's (Δ B), the state's exact, as in the
    paper's own kernel.

    Args:
        x: the inputs.
        delta: Δ, the step sizes, at least 0; with `delta_bias` and `delta_softplus` what they are made from.
        A: at most 0 (not checked, for speed).
        B, C: input and output weights; `g` groups of channels share them, and `g` divides `d`. Channel i uses group
            i // (d / g).
        D: weight of the input in the output; none by default.
        z: gate of the output; none by default.
        delta_bias: added to `delta`, before the softplus.
        delta_softplus: whether Δ = softplus(delta + delta_bias).
        initial_state: the state to resume from, zeros by default; one per sequence: s = b, or the number of packed
            sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference", "chunked", "native" or "triton".

    Returns:
        The output in x's dtype, and the state after the last step: float32, or float64 where x is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    check_flag("delta_softplus", delta_softplus)
    _check(x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    return OP.dispatch(
        backend,
        x=x,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _check(x, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens) -> None:
    b, t, d = x.shape
    n, g = A.shape[-1], B.shape[2]
    if A.shape[0] != d or n < 1:
        raise UnsupportedShape(f"A: shape {tuple(A.shape)} is not (d, n) with d = {d} and n >= 1")
    for name, value, wanted in (
        ("delta", delta, (b, t, d)),
        ("z", z, (b, t, d)),
        ("B", B, (b, t, g, n)),
        ("C", C, (b, t, g, n)),
        ("D", D, (d,)),
        ("delta_bias", delta_bias, (d,)),
    ):
        if value is not None and tuple(value.shape) != wanted:
            raise UnsupportedShape(f"{name}: shape {tuple(value.shape)} is not {wanted}")
    if g < 1 or d % g:
        raise UnsupportedShape(f"B: its {g} groups must divide x's {d} channels")
    check_boundaries(cu_seqlens, b, t)
    check_state(initial_state, b, cu_seqlens, d, n)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    x = arguments["x"]
    if x.numel():
        return None
    return x.new_zeros(x.shape), untouched(arguments, x, accumulate_dtype(x.dtype), *arguments["A"].shape)


def _triton_refusal(arguments: Mapping[str, Any]) -> str | None:
    if (states := arguments["A"].shape[1]) > MOST_STATES:
        return f"A has {states} states a channel, and a Triton program holds at most {MOST_STATES}"
    return triton_refusal(arguments)


def _traffic(arguments: Mapping[str, Any]) -> float:
    """Every sequence is read once, and the output written; the states stay in registers."""
    x = arguments["x"]
    read = [arguments[name] for name in ("x", "delta", "B", "C", "z") if arguments.get(name) is not None]
    return float(sum(a.numel() * a.element_size() for a in (*read, x)))


def _everything(draw: Draw, b: int, t: int, d: int = 10, n: int = 3, g: int = 1) -> dict[str, Any]:
    return {
        "x": draw.normal(b, t, d),
        "delta": draw.normal(b, t, d),
        "A": -draw.uniform(0.5, n + 0.5, d, n),
        "B": draw.normal(b, t, g, n),
        "C": draw.normal(b, t, g, n, scale=n**-0.5),
        "D": draw.normal(d),
        "z": draw.normal(b, t, d),
        "delta_bias": draw.uniform(-4.0, 0.0, d),
        "delta_softplus": True,
    }


def _without(*names: str, **sizes: int):
    """Arguments whose steps are drawn as such, and without those named."""

    def make(draw: Draw, b: int, t: int) -> dict[str, Any]:
        made = _everything(draw, b, t, **sizes)
        made |= {"delta": -draw.log_decay(b, t, made["x"].shape[2]), "delta_softplus": False}
        made["A"] = draw.log_decay(*made["A"].shape)
        if "delta_bias" not in names:
            made["delta_bias"] = draw.uniform(0.0, 1.0, made["x"].shape[2])
        return {name: value for name, value in made.items() if name not in names}

    return make


def _packed(draw: Draw) -> dict[str, Any]:
    made = _without("D", "z", "delta_bias", d=512, n=64)(draw, 1, 2048)
    made["initial_state"] = draw.normal(3, 512, 64)
    return made | {"cu_seqlens": torch.tensor([0, 100, 1000, 2048], dtype=torch.int32, device=draw.device)}


def _cases() -> tuple[Case, ...]:
    return (
        Case(
            name="everything",
            make=_everything,
            state=lambda draw, s: draw.normal(s, 10, 3),
            compile=lambda draw: _everything(draw, 1, 2048, 1536, 16),
            bench=lambda draw, t: _everything(draw, 1, t, 1536, 16),
        ),
        Case(
            name="plain",
            make=_without("D", "z", "delta_bias", d=3, n=2),
            state=lambda draw, s: draw.normal(s, 3, 2),
            compile=_packed,
        ),
        Case(
            name="groups, gate",
            make=_without("D", d=6, n=5, g=2),
            state=lambda draw, s: draw.normal(s, 6, 5),
        ),
    )


OP = register_op(
    Op(
        name="selective_scan",
        backends=backends("selective_scan", "native", "triton", "chunked", "reference", triton=_triton_refusal),
        sequences=("x", "delta", "B", "C", "z"),
        cases=_cases,
        traffic=_traffic,
        empty=_empty,
        summary="h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t, y_t = (C_t h_t + D x_t) silu(z_t)",
        tensors=floats(x=3, delta=3, A=2, B=4, C=4)
        + floats(D=1, z=3, delta_bias=1, initial_state=3, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
