"""Test-time training token by token: the primal form, with the inner gradient written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import flat_weights, layers_of, state_parts


def test_time_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w1: Tensor,
    b1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w2: Tensor | None,
    b2: Tensor | None,
    momentum: Tensor | None,
    decay: Tensor | None,
    chunk: int,
    eps: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `omnimix.kernels.test_time`."""
    wide = torch.promote_types(v.dtype, torch.float32)
    (b, _, h, size), hidden = v.shape, None if w2 is None else w1.shape[2]
    first = flat_weights(w1, b1, w2, b2, wide)
    norm = norm_weight.to(wide), norm_bias.to(wide), eps
    keep = torch.ones_like(lr, dtype=wide) if decay is None else decay.to(wide).exp()
    streams = [x.to(wide) for x in (q, k, v, lr, torch.zeros_like(lr) if momentum is None else momentum, keep)]
    if cu_seqlens is None:
        sequences = list(zip(*streams, strict=True))
    else:
        lengths = cu_seqlens.diff().tolist()
        sequences = list(zip(*(x[0].split(lengths) for x in streams), strict=True))
    outputs, states = [], []
    for i, sequence in enumerate(sequences):
        start = now = first
        step, place = torch.zeros_like(first), 0
        if initial_state is not None:
            parts = state_parts(initial_state[i].to(wide), size, hidden, momentum=momentum is not None)
            start, now, step = first + parts["start"], first + parts["now"], parts.get("momentum", step)
            place = round(parts["place"][0].item())
        for q_t, k_t, v_t, lr_t, momentum_t, keep_t in zip(*sequence, strict=True):
            gradient = _gradient(layers_of(start, size, hidden), k_t, v_t, *norm)
            step = momentum_t[:, None] * step - lr_t[:, None] * gradient
            now = keep_t[:, None] * now + step
            outputs.append(_read(layers_of(now, size, hidden), q_t, *norm))
            place = (place + 1) % chunk
            start = now if place == 0 else start
        kept = [start - first, now - first, *([step] if momentum is not None else [])]
        states.append(torch.cat([*kept, torch.full_like(first[:, :1], place)], dim=1))
    return torch.stack(outputs).view(b, -1, h, size).to(v.dtype), torch.stack(states)


def _affine(x: Tensor, layer: Tensor) -> Tensor:
    """x (h, i) through each head's layer (h, i + 1, o), whose last row is the bias."""
    return (x[:, :, None] * layer[:, :-1]).sum(1) + layer[:, -1]


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation


def _read(layers: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """f(x) = x + LN(g(x))."""
    z = x
    for i, layer in enumerate(layers):
        z = _affine(F.gelu(z) if i else z, layer)
    return x + weight * _normalised(z, eps)[0] + bias


def _gradient(layers: list[Tensor], k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """∇ of ½ |f(k) − v|² with respect to the layers' weights and biases, (h, p) in their order."""
    inputs, values = [k], [_affine(k, layers[0])]
    for layer in layers[1:]:
        inputs.append(F.gelu(values[-1]))
        values.append(_affine(inputs[-1], layer))
    unit, deviation = _normalised(values[-1], eps)
    of_unit = (k + weight * unit + bias - v) * weight
    centred = of_unit - of_unit.mean(-1, keepdim=True) - unit * (of_unit * unit).mean(-1, keepdim=True)
    of_value = centred / deviation
    parts: list[Tensor] = []
    for i in reversed(range(len(layers))):
        parts = [(inputs[i][:, :, None] * of_value[:, None]).flatten(1), of_value, *parts]
        if i:
            x = values[i - 1]
            slope = 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            of_value = (layers[i][:, :-1] * of_value[:, None]).sum(-1) * slope
    return torch.cat(parts, dim=1)
