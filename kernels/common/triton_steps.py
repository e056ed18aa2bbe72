"""One step of `gated_linear` and `delta_rule` in one kernel: decoding reads each state once and writes it once.

Bytes moved for each head: the state twice, 8 K V; 3 operations (6 with the rank-one part) for each of its elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tools import accumulate_dtype, dot_mode, grid, on_device_of, tile, tuned, unit_stride
from .triton_chunks import CHANNEL, NONE, SCALAR, _of
from .triton_launches import strides

WIDEST = 256


@tuned([{"num_warps": 4}], key=["K", "V", "DECAY"])
@triton.jit
def _step_kernel(
    q, k, v, a, b, decay, bonus, initial, out, final, q_strides, k_strides, v_strides, a_strides, b_strides, d_strides,
    H, K, V, scale: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The next state, and the output. Program: batch entry and head, tile of values."""
    ACC: tl.constexpr = tl.float64 if MODE == "float64" else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    batch, head = pid // H, pid % H
    column = tl.arange(0, BK)
    value = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    keys, values = column < K, value < V
    at = pid * K * V + column[:, None] * V + value[None, :]
    inside = keys[:, None] & values[None, :]
    qt = tl.load(_of(q, q_strides, batch, head) + column, mask=keys, other=0.0).to(ACC)
    kt = tl.load(_of(k, k_strides, batch, head) + column, mask=keys, other=0.0).to(ACC)
    vt = tl.load(_of(v, v_strides, batch, head) + value, mask=values, other=0.0).to(ACC)
    before = tl.zeros((BK, BV), ACC)
    if initial is not None:
        before += tl.load(initial + at, mask=inside, other=0.0).to(ACC)
    after = before
    if DECAY != NONE:
        decay += batch * d_strides[0] + head * d_strides[2]
        if DECAY == CHANNEL:
            after = before * tl.exp(tl.load(decay + column, mask=keys, other=0.0).to(ACC))[:, None]
        else:
            after = before * tl.exp(tl.load(decay).to(ACC))
    if b is not None:
        bt = tl.load(_of(b, b_strides, batch, head) + column, mask=keys, other=0.0).to(ACC)
        found = tl.sum(bt[:, None] * before, 0)
        if a is None:
            vt += found
        else:
            along = tl.load(_of(a, a_strides, batch, head) + column, mask=keys, other=0.0).to(ACC)
            after += along[:, None] * found[None, :]
    write = kt[:, None] * vt[None, :]
    after += write
    read = after
    if bonus is not None:
        weight = tl.load(bonus + head * K + column, mask=keys, other=0.0).to(ACC)
        read = before + weight[:, None] * write
    result = tl.sum(qt[:, None] * read, 0) * scale
    tl.store(out + pid * V + value, result.to(out.dtype.element_ty), mask=values)
    tl.store(final + at, after, mask=inside)


def serves(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a call is one step, with keys that fit a tile."""
    return v.shape[1] == 1 and cu_seqlens is None and q.shape[3] <= WIDEST


def step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, decay: Tensor | None, bonus: Tensor | None,
    initial: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (b, 1, h, v) and the next state (b, h, k, v).

    Args:
        q, k: (b, 1, g, k), as in `gated_linear`; v: (b, 1, h, v).
        a, b: the rank-one part, of `delta_rule`; with b alone, a is k.
        decay: None, (b, 1, h) or (b, 1, h, k).
        bonus: of `gated_linear`, (h, k).
        initial: the state.
        scale: of the output.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    a, b = (None if x is None else unit_stride(x) for x in (a, b))
    bonus, initial = (None if x is None else x.contiguous() for x in (bonus, initial))
    form, d_strides = NONE.value, (0, 0, 0)
    if decay is not None:
        form = (SCALAR if decay.dim() == 3 else CHANNEL).value
        decay = decay if decay.dim() == 3 else unit_stride(decay)
        d_strides = decay.stride()[:3]
    out, final = shapes(q, v)
    batch, _, heads, width_v = v.shape
    width, bv = q.shape[3], tile(width_v, 32)
    with on_device_of(v):
        _step_kernel[grid(batch * heads, triton.cdiv(width_v, bv))](
            q, k, v, a, b, decay, bonus, initial, out, final, q_strides=strides(q, heads),
            k_strides=strides(k, heads), v_strides=strides(v, heads), a_strides=strides(a, heads),
            b_strides=strides(b, heads), d_strides=d_strides, H=heads, K=width, V=width_v, scale=scale, DECAY=form,
            MODE=dot_mode(v.dtype, wide=True), BK=tile(width, WIDEST), BV=bv,
        )  # fmt: skip
    return out, final


def shapes(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """An output and a state of `step`, not filled."""
    batch, _, heads, width_v = v.shape
    state = v.new_empty(batch, heads, q.shape[3], width_v, dtype=accumulate_dtype(v.dtype))
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), state
