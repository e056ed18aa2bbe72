"""Test-time training: a model inside the layer whose weights are the state, trained on each mini-batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedShape
from ..backends import backends
from ..common.checks import check_boundaries, check_real, check_state, check_whole, floats, integers, untouched
from ..common.tools import accumulate_dtype
from ..registry import Case, Draw, Op, register_op
from .memory import state_parts, state_size

# The products within a mini-batch take memory that grows with the square of its tokens, and an incomplete mini-batch
# costs as much as a full one.
MOST_CHUNK = 1 << 14

__all__ = ["state_parts", "state_size", "test_time"]


def test_time(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h k"],
    lr: Float[Tensor, "b t h"],
    w1: Float[Tensor, "h k m"],
    b1: Float[Tensor, "h m"],
    norm_weight: Float[Tensor, "h k"],
    norm_bias: Float[Tensor, "h k"],
    *,
    w2: Float[Tensor, "h m k"] | None = None,
    b2: Float[Tensor, "h k"] | None = None,
    momentum: Float[Tensor, "b t h"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    chunk: int = 16,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "n h s"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "n h s"]]:
    """W_t = e^{decay_t} W_{t-1} + S_t,  S_t = momentum_t S_{t-1} − lr_t ∇ℓ(W°; k_t, v_t),  o_t = f(q_t; W_t).

    TTT (arXiv 2407.04620, eq. 1, 2 and 7): f(x; W) = x + LN(g(x; W)) with g linear, or with `w2` two layers and GELU
    between; ℓ(W; k, v) = ½ |f(k; W) − v|², so that g learns v − k; W° are the weights where the mini-batch of `chunk`
    tokens began, counted from the sequence's start. Titans (arXiv 2501.00663, eq. 13 and 14) adds momentum, and decay
    that forgets: η = momentum, α = 1 − e^decay. The 1/i by which the authors' code of TTT scales the step of the i-th
    token of a mini-batch is no part of the equations, nor of this op. LN is a layer norm over k.

    There is no Triton backend; the weights take float32, or float64 where v is.

    Args:
        q: what is read with, test view of the token.
        k: the inner model's inputs, training view.
        v: its targets, label view.
        lr: inner learning rate, any factors included.
        w1, b1: weights before the first token (of the first layer); m = k where there is no second layer.
        norm_weight, norm_bias: of LN.
        w2, b2: of the second layer; both or neither.
        momentum: η, in [0, 1] (not checked, for speed); none by default.
        decay: log decay of the weights, at most 0 (not checked); none by default. Where it forgets nearly everything,
            LN sees nearly nothing and its gradient is as steep as 1 / sqrt(eps).
        chunk: tokens in a mini-batch, at most 16384.
        eps: of LN.
        initial_state: what `test_time` returned last; zeros by default: w1 … b2 untouched. One per sequence: n = b, or
            the number of packed sequences. `state_size` says how large it is, `state_parts` what it holds.
        cu_seqlens: for packed sequences (b = 1): 0, then the running total of their lengths, int32 or int64.
        backend: "auto", "reference" or "chunked".

    Returns:
        The output in v's dtype, and the state after the last step, float32, or float64 where v is: the weights'
        distance from w1 … b2 at the mini-batch's start and now, the momentum, and the place in the mini-batch.

    Raises:
        UnsupportedShape: shapes that do not fit, with the argument's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    OP.check(q, k, v, lr, w1, b1, norm_weight, norm_bias, w2, b2, momentum, decay, initial_state, cu_seqlens)
    check_whole("chunk", chunk, least=1, most=MOST_CHUNK)
    check_real("eps", eps, least=0)
    _check(q, k, v, w1, w2, b2, cu_seqlens)
    _check_small(lr, w1, b1, norm_weight, norm_bias, momentum, decay, q.shape)
    _check_state(v, w1, w2, momentum, initial_state, cu_seqlens)
    return OP.dispatch(
        backend,
        q=q,
        k=k,
        v=v,
        lr=lr,
        w1=w1,
        b1=b1,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        w2=w2,
        b2=b2,
        momentum=momentum,
        decay=decay,
        chunk=chunk,
        eps=eps,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _check(q, k, v, w1, w2, b2, cu_seqlens) -> None:
    b, t, h, size = v.shape
    if q.shape != v.shape or k.shape != v.shape:
        raise UnsupportedShape(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape: v is rebuilt from k"
        )
    if w1.shape[:2] != (h, size) or (w2 is None and w1.shape[2] != size):
        raise UnsupportedShape(f"w1: shape {tuple(w1.shape)} is not {(h, size, size if w2 is None else 'm')}")
    if (w2 is None) != (b2 is None):
        raise UnsupportedShape("w2 and b2 make the second layer together; pass both or neither")
    if w2 is not None and tuple(w2.shape) != (h, w1.shape[2], size):
        raise UnsupportedShape(f"w2: shape {tuple(w2.shape)} is not {(h, w1.shape[2], size)}")
    if b2 is not None and tuple(b2.shape) != (h, size):
        raise UnsupportedShape(f"b2: shape {tuple(b2.shape)} is not {(h, size)}")
    check_boundaries(cu_seqlens, b, t)


def _check_small(lr, w1, b1, norm_weight, norm_bias, momentum, decay, shape) -> None:
    b, t, h, size = shape
    wanted = {"lr": (lr, (b, t, h)), "momentum": (momentum, (b, t, h)), "decay": (decay, (b, t, h))}
    wanted |= {"norm_weight": (norm_weight, (h, size)), "norm_bias": (norm_bias, (h, size))}
    for name, (x, fits) in wanted.items():
        if x is not None and tuple(x.shape) != fits:
            raise UnsupportedShape(f"{name}: shape {tuple(x.shape)} is not {fits}")
    if tuple(b1.shape) != (h, w1.shape[2]):
        raise UnsupportedShape(f"b1: shape {tuple(b1.shape)} is not {(h, w1.shape[2])}")


def _check_state(v, w1, w2, momentum, initial_state, cu_seqlens) -> None:
    check_state(initial_state, v.shape[0], cu_seqlens, v.shape[2], _size(w1, w2, momentum))


def _size(w1, w2, momentum) -> int:
    return state_size(w1.shape[1], None if w2 is None else w1.shape[2], momentum=momentum is not None)


def _empty(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    v = arguments["v"]
    if v.numel():
        return None
    size = _size(*(arguments[name] for name in ("w1", "w2", "momentum")))
    state = untouched(arguments, v, accumulate_dtype(v.dtype), v.shape[2], size)
    # The place in the mini-batch is a count, which has no gradient.
    return v.new_zeros(v.shape), torch.cat([state[..., :-1], state[..., -1:].detach()], dim=-1)


def _flops(arguments: Mapping[str, Any]) -> float:
    """Of the dual form: each layer forward on k and q, its gradients, and the products within a mini-batch.

    Momentum is a second set of weights, which q reads and gradients change.
    """
    (b, t, h, size), m = arguments["q"].shape, arguments["w1"].shape[2]
    layers = [(size, m)] if arguments.get("w2") is None else [(size, m), (m, size)]
    within = arguments.get("chunk", 16)
    each = 3 if arguments.get("momentum") is None else 5
    products = sum(each * i * o + within * (i + o) for i, o in layers) + (size * m if len(layers) > 1 else 0)
    return 2.0 * b * t * h * products


def _inner_flops(arguments: Mapping[str, Any]) -> float:
    """Of the loop over mini-batches: each layer forward on k, its update, and the gradient between two layers."""
    x, hidden = arguments["x"], arguments["hidden"]
    size = x.shape[-1] - 1
    layers = [((size + 1) * hidden), (hidden + 1) * size] if hidden else [(size + 1) * size]
    updates = 1 if arguments.get("momentum") is None else 2
    return 2.0 * x.shape[:-1].numel() * (sum(layers) * (1 + updates) + size * hidden)


def _case(
    name: str,
    hidden: int | None = None,
    momentum: bool = False,
    decay: bool = False,
    chunk: int = 4,
    typical: tuple[int, int] | None = None,
) -> Case:
    def arguments(draw: Draw, b: int, t: int, h: int, size: int, m: int | None, chunk: int):
        out = size if m is None else m
        made = {
            "q": draw.normal(b, t, h, size),
            # Steps of gradient descent along keys of any length diverge.
            "k": F.normalize(draw.normal(b, t, h, size), dim=-1),
            "v": draw.normal(b, t, h, size),
            "lr": draw.uniform(0.0, 0.1, b, t, h),
            "w1": draw.normal(h, size, out, scale=size**-0.5),
            "b1": draw.normal(h, out, scale=0.1),
            "norm_weight": draw.uniform(0.5, 1.5, h, size),
            "norm_bias": draw.normal(h, size, scale=0.1),
            "chunk": chunk,
            # Where the inner values are all but equal, LN's gradient is as steep as 1 / sqrt(eps) and errors grow.
            "eps": 0.1,
        }
        if m is not None:
            made |= {"w2": draw.normal(h, m, size, scale=m**-0.5), "b2": draw.normal(h, size, scale=0.1)}
        if momentum:
            made["momentum"] = draw.uniform(0.0, 0.8, b, t, h)
        if decay:
            made["decay"] = draw.log_decay(b, t, h)
        return made

    def state(draw: Draw, n: int) -> Tensor:
        size = state_size(3, hidden, momentum=momentum)
        weights = draw.normal(n, 2, size - 1, scale=0.3)
        place = torch.full((n, 2, 1), chunk // 2, dtype=weights.dtype, device=weights.device)
        return torch.cat([weights, place], dim=-1)

    return Case(
        name=name,
        make=lambda draw, b, t: arguments(draw, b, t, 2, 3, hidden, chunk),
        state=state,
        bench=(lambda draw, t: arguments(draw, 1, t, *typical, hidden and 4 * typical[1], 16)) if typical else None,
    )


def _cases() -> tuple[Case, ...]:
    return (
        _case("linear", typical=(4, 64)),
        _case("linear, momentum, decay", momentum=True, decay=True, chunk=5),
        _case("mlp, momentum", hidden=4, momentum=True, chunk=20),
    )


OP = register_op(
    Op(
        name="test_time",
        backends=backends("test_time", "chunked", "reference"),
        sequences=("q", "k", "v", "lr", "momentum", "decay"),
        cases=_cases,
        flops=_flops,
        empty=_empty,
        parts={"test_time_inner": _inner_flops},
        summary="W_t = e^{decay_t} W_{t-1} + S_t, S_t = momentum_t S_{t-1} - lr_t grad l(W0), o_t = f(q_t; W_t)",
        tensors=floats(q=4, k=4, v=4, lr=3, w1=3, b1=2, norm_weight=2, norm_bias=2)
        + floats(w2=3, b2=2, momentum=3, decay=3, initial_state=3, optional=True)
        + integers(cu_seqlens=1, optional=True),
    )
)
