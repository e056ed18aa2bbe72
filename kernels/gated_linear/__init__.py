"""Gated linear recurrence with a matrix state: linear attention, RetNet, GLA, RWKV-6, mLSTM and Mamba-2 in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_matrix_recurrence, floats, integers, untouched
from ..common.tools import accumulate_dtype
from ..registry import Case, Draw, Op, register_op


def gated_linear(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    decay: Float[Tensor, "..."] | None = None,
    *,
    bonus: Float[Tensor, "h k"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "n h k v"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h k v"]]:
    """S_t = diag(exp(decay_t)) S_{t-1} + k_t v_tᵀ,  o_t = scale · S_tᵀ q_t.

    With `bonus` u (RWKV-6, arXiv 2404.05892, eq. 19) the output reads the state before the update:
    o_t = scale · (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t.

    Args:
        q, k: queries and keys; `g` groups of heads share them, and `g` divides `h` (Mamba-2's groups). Head i uses
            group i // (h / g).
        v: values.
        decay: log decay, at most 0 (not checked, for speed): None for no decay, `(h,)` constant per head (RetNet),
            `(b, t, h)` a scalar per step and head (Mamba-2), `(b, t, h, k)` per channel (GLA).
        bonus: RWKV-6's weight on the current token.
        scale: factor on the output; k ** -0.5 by default.
        initial_state: the state to resume from, zeros by default; one per sequence: n = b, or the number of packed
            sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference", "chunked", "native" (on CPUs) or "triton".

    Returns:
        The output in v's dtype, and the state after the last step: float32, or float64 where v is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(q, k, v, decay, bonus, initial_state, cu_seqlens)
    check_matrix_recurrence(q, k, v, decay, initial_state, cu_seqlens, scale)
    of_heads = (v.shape[2], q.shape[3])
    if bonus is not None and tuple(bonus.shape) != of_heads:
        raise UnsupportedShape(f"bonus: shape {tuple(bonus.shape)} is not {of_heads}")
    return OP.dispatch(
        backend,
        q=q,
        k=k,
        v=v,
        decay=decay,
        bonus=bonus,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    v, q = arguments["v"], arguments["q"]
    if v.numel():
        return None
    return v.new_zeros(v.shape), untouched(arguments, v, accumulate_dtype(v.dtype), v.shape[2], q.shape[3], v.shape[3])


def _flops(arguments: Mapping[str, Any]) -> float:
    """Of the chunked algorithm: the state's products with k, v and q, and those within chunks of 64 steps."""
    q, v, decay = arguments["q"], arguments["v"], arguments.get("decay")
    (b, t, h, dv), (g, dk) = v.shape, q.shape[2:]
    chunk = min(64, t)
    scores = h if decay is not None and decay.dim() == 4 else g
    return 2.0 * b * t * (2 * h * dk * dv + chunk * (h * dv + scores * dk))


def _case(
    name: str,
    decay: str | None,
    groups: int = 2,
    bonus: bool = False,
    heads: int = 2,
    compiled: bool = False,
    typical: tuple[int, int, int, int] | None = None,
) -> Case:
    def arguments(draw: Draw, b: int, t: int, g: int, h: int, dk: int, dv: int, strength: float = 1.0):
        shapes = {"head": (h,), "scalar": (b, t, h), "channel": (b, t, h, dk)}
        made = {
            "q": draw.normal(b, t, g, dk),
            "k": draw.normal(b, t, g, dk, scale=dk**-0.5),
            "v": draw.normal(b, t, h, dv),
            "decay": None if decay is None else draw.log_decay(*shapes[decay], scale=strength),
        }
        return made | ({"bonus": draw.normal(h, dk)} if bonus else {})

    # On a GPU: Mamba-2's sizes where heads share q and k, GLA's otherwise. A decay per head runs as a scalar one.
    large = (1, 8, 128, 64) if groups < heads else (4, 4, 64, 128)

    def on_gpu(draw: Draw):
        made = arguments(draw, 1, 2048, *large)
        if decay == "channel":
            _, h, dk, dv = large
            made["initial_state"] = torch.zeros(3, h, dk, dv, device=draw.device)
            made["cu_seqlens"] = torch.tensor([0, 100, 1000, 2048], dtype=torch.int32, device=draw.device)
        return made

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, groups, heads, 5, 7),
        state=lambda draw, n: draw.normal(n, heads, 5, 7),
        compile=on_gpu if compiled else None,
        # Trained decays are weaker than those that the laws are tried on.
        bench=(lambda draw, t: arguments(draw, 1, t, *typical, strength=0.05)) if typical else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("no decay", None),
        _case("decay per head", "head"),
        _case("scalar decay", "scalar", typical=(4, 4, 64, 64)),
        _case("scalar decay, grouped", "scalar", groups=1, heads=4, compiled=True, typical=(1, 24, 128, 64)),
        _case("decay per channel", "channel", compiled=True, typical=(4, 4, 64, 64)),
        _case("decay per channel, grouped", "channel", groups=1),
        _case("bonus", "channel", bonus=True, compiled=True),
        _case("bonus, scalar decay", "scalar", bonus=True),
    )


OP = register_op(
    Op(
        name="gated_linear",
        backends=backends("gated_linear", "triton", "native", "chunked", "reference"),
        sequences=("q", "k", "v", "decay"),
        cases=_cases,
        flops=_flops,
        empty=_empty,
        summary="S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t",
        tensors=floats(q=4, k=4, v=4)
        + floats(decay=(1, 3, 4), bonus=2, initial_state=4, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
