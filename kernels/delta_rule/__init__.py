"""Delta rule with a matrix state: DeltaNet, Gated DeltaNet, KDA, Comba and RWKV-7 in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedCall, UnsupportedShape
from ..backends import backends
from ..common.checks import check_matrix_recurrence, floats, integers, untouched
from ..common.tools import accumulate_dtype, triton_refusal
from ..registry import Case, Draw, Op, register_op

# Elements of a head's state up to which the recurrence itself is faster than matrix products over chunks.
LARGEST_STATE = 1 << 16


def delta_rule(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    beta: Float[Tensor, "b t h"] | None = None,
    decay: Float[Tensor, "..."] | None = None,
    *,
    removal: Float[Tensor, "b t g k"] | None = None,
    a: Float[Tensor, "b t g k"] | None = None,
    b: Float[Tensor, "b t g k"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "n h k v"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h k v"]]:
    """S_t = (I - β_t k_t k̃_tᵀ) diag(exp(decay_t)) S_{t-1} + β_t k_t v_tᵀ,  o_t = scale · S_tᵀ q_t.

    DeltaNet (arXiv 2406.06484, no decay), Gated DeltaNet (arXiv 2412.06464, eq. 10, a scalar decay) and KDA (Kimi
    Linear, arXiv 2510.26692, a decay per channel): what the decayed state holds for the removal key k̃ is replaced by
    v under the key k. k̃ is k by default. With unit keys and β in (0, 2) the state never grows; β above 1 gives
    eigenvalues below 0 (arXiv 2411.12537).

    The general form, diagonal plus rank one, is taken where `a` and `b` are given:

        S_t = diag(exp(decay_t)) S_{t-1} + a_t (b_tᵀ S_{t-1}) + k_t v_tᵀ

    Its rank-one part acts on the state before the decay, as in RWKV-7 (arXiv 2503.14456, eq. 16-17: b = κ̂,
    a = -κ̂ ⊙ in-context rate) and in Comba's state feedback (arXiv 2506.02475: a = -β k, b = p, and β v for v).

    Args:
        q, k: queries and keys; `g` groups of heads share them, and `g` divides `h`. Head i uses group i // (h / g).
            Keys are taken as they are: normalise them where the rule asks for it.
        v: values.
        beta: how much of the old value is replaced; None for 1. Not in the general form.
        decay: log decay, at most 0 (not checked, for speed): None for no decay, `(h,)` constant per head, `(b, t, h)`
            a scalar per step and head, `(b, t, h, k)` per channel.
        removal: k̃, the key whose value is removed. Not in the general form.
        a, b: the rank-one part of the general form; both or none.
        scale: factor on the output; k ** -0.5 by default.
        initial_state: the state to resume from, zeros by default; one per sequence: n = b, or the number of packed
            sequences.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference", "chunked", "native" (on CPUs; several steps take states of at most
            LARGEST_STATE elements a head) or "triton".

    Returns:
        The output in v's dtype, and the state after the last step: float32, or float64 where v is.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        UnsupportedCall: one of `a` and `b` without the other, or together with `beta` or `removal`.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(q, k, v, beta, decay, removal, a, b, initial_state, cu_seqlens)
    _check_forms(beta, removal, a, b)
    check_matrix_recurrence(q, k, v, decay, initial_state, cu_seqlens, scale)
    _check_keys(k, v, beta, {"removal": removal, "a": a, "b": b})
    return OP.dispatch(
        backend,
        q=q,
        k=k,
        v=v,
        beta=beta,
        decay=decay,
        removal=removal,
        a=a,
        b=b,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _check_forms(beta, removal, a, b) -> None:
    if (a is None) != (b is None):
        given, missing = ("a", "b") if b is None else ("b", "a")
        raise UnsupportedCall(f"{given} is given without {missing}; the general form needs both")
    if a is not None and (beta is not None or removal is not None):
        name = "removal" if beta is None else "beta"
        raise UnsupportedCall(f"{name} cannot be combined with a and b; leave it out, or multiply it into a, b and v")


def _check_keys(k, v, beta, keys) -> None:
    for name, x in keys.items():
        if x is not None and x.shape != k.shape:
            raise UnsupportedShape(f"{name}: shape {tuple(x.shape)} is not k's {tuple(k.shape)}")
    if beta is not None and beta.shape != v.shape[:3]:
        raise UnsupportedShape(f"beta: shape {tuple(beta.shape)} is not {tuple(v.shape[:3])}")


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    v, q = arguments["v"], arguments["q"]
    if v.numel():
        return None
    return v.new_zeros(v.shape), untouched(arguments, v, accumulate_dtype(v.dtype), v.shape[2], q.shape[3], v.shape[3])


def _flops(arguments: Mapping[str, Any]) -> float:
    """Of the chunked algorithm in chunks of 32 steps: scores, the triangular system, and the state's products."""
    k, v = arguments["k"], arguments["v"]
    (batch, t, h, dv), dk = v.shape, k.shape[-1]
    chunk = min(32, t)
    streams = 1 if arguments.get("a") is None else 2
    scores = chunk * streams * (2 * dk + dv)
    system = chunk * (chunk // 3 + dk + dv)
    return 2.0 * batch * t * h * (scores + system + (2 + streams) * dk * dv)


def _triton_refusal(arguments: Mapping[str, Any]) -> str | None:
    width = arguments["k"].shape[-1]
    if width > 128:
        return f"its kernels hold keys of at most 128 channels, not {width}"
    return triton_refusal(arguments)


def _native_limits(arguments: Mapping[str, Any]) -> str | None:
    """States that leave the caches are worth the matrix products of `chunked`, except for a single step."""
    v, keys = arguments["v"], arguments["k"].shape[-1]
    if keys * v.shape[-1] > LARGEST_STATE and v.shape[1] != 1:
        return f"it takes states of at most {LARGEST_STATE} elements a head, and these have more"
    return None


def _unit(x: Tensor) -> Tensor:
    return x if x.device.type == "meta" else torch.nn.functional.normalize(x, dim=-1)


def _case(
    name: str,
    decay: str | None = None,
    groups: int = 2,
    heads: int = 2,
    form: str = "delta",
    strength: float = 1.0,
    compiled: tuple[int, int, int, int] | None = None,
    typical: tuple[int, int, int, int] | None = None,
) -> Case:
    """A case of delta_rule; `compiled` and `typical` are its (g, h, k, v) on a GPU and on a CPU."""

    def arguments(draw: Draw, b: int, t: int, g: int, h: int, dk: int, dv: int, strength: float):
        shapes = {"head": (h,), "scalar": (b, t, h), "channel": (b, t, h, dk)}
        key = _unit(draw.normal(b, t, g, dk))
        made = {
            "q": draw.normal(b, t, g, dk),
            "k": key,
            "v": draw.normal(b, t, h, dv),
            "decay": None if decay is None else draw.log_decay(*shapes[decay], scale=strength),
        }
        if form == "general":
            rate = draw.uniform(0.0, 1.0, b, t, g, dk)
            return made | {"a": -key * rate, "b": key, "k": key * draw.uniform(0.5, 1.0, b, t, g, dk)}
        made["beta"] = draw.uniform(0.0, 2.0, b, t, h)
        return made | ({"removal": key * draw.uniform(0.2, 1.0, b, t, g, dk)} if form == "removal" else {})

    def on_gpu(draw: Draw, g: int, h: int, dk: int, dv: int) -> dict[str, Any]:
        made = arguments(draw, 1, 2048, g, h, dk, dv, strength)
        if decay == "channel":
            made["initial_state"] = torch.zeros(3, h, dk, dv, device=draw.device)
            made["cu_seqlens"] = torch.tensor([0, 100, 1000, 2048], dtype=torch.int32, device=draw.device)
        return made

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, groups, heads, 5, 7, strength),
        state=lambda draw, n: draw.normal(n, heads, 5, 7),
        compile=(lambda draw: on_gpu(draw, *compiled)) if compiled else None,
        # Trained decays are weaker than those that the laws are tried on.
        bench=(lambda draw, t: arguments(draw, 1, t, *typical, strength=0.05)) if typical else None,
    )


def _cases() -> tuple[Case, ...]:
    sizes = (4, 4, 64, 64)
    return (
        _case("no decay", typical=sizes),
        _case("scalar decay, grouped", "scalar", groups=1, compiled=(16, 32, 128, 128), typical=sizes),
        _case("decay per channel, removal key", "channel", form="removal", compiled=(4, 4, 128, 128), typical=sizes),
        _case("decay per head", "head", strength=0.2),
        _case("general", "channel", form="general", compiled=(4, 4, 64, 64), typical=sizes),
    )


OP = register_op(
    Op(
        name="delta_rule",
        backends=backends(
            "delta_rule",
            "triton",
            "native",
            "chunked",
            "reference",
            native_limits=_native_limits,
            triton=_triton_refusal,
        ),
        sequences=("q", "k", "v", "beta", "decay", "removal", "a", "b"),
        cases=_cases,
        flops=_flops,
        empty=_empty,
        summary="S_t = (I - b_t k_t k~_t^T) diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T, o_t = scale S_t^T q_t",
        tensors=floats(q=4, k=4, v=4)
        + floats(beta=3, decay=(1, 3, 4), removal=4, a=4, b=4, initial_state=4, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
