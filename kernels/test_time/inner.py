"""The inner training loop of `test_time` as a custom op: mini-batch after mini-batch, forward and backward by hand.

All sequences advance together, in waves of one piece of a mini-batch each. Per wave, with the weights W° that the
mini-batch began with, X̃ = [X, 1] and W̃ holding the bias as its last row:

    Z = X̃ W̃°,   U = affine ⊙ LN(Z) + offset,   D = LN'(Z)ᵀ U = r (U − mean U − Ẑ mean(U ⊙ Ẑ))
    W̃ ← keep · W̃ + feed · S + (coef ⊙ X̃)ᵀ D,   S ← hold · S + (coef_s ⊙ X̃)ᵀ D

where affine = γ² and offset = γ (β − v + k), so that U is the gradient of ½ |γ Ẑ + β − (v − k)|² with respect to Ẑ.
What reads the weights (queries, gates, the loss) is outside, in products over all waves at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..custom import custom_op
from .memory import layers_of


def gelu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and second derivative of GELU."""
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    first = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5).addcmul_(x, density)
    return first, density * (2 - x * x)


def with_one(x: Tensor) -> Tensor:
    """[x, 1], for weights that hold their bias as the last row."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


@dataclass
class _Norm:
    """A layer norm without weights, of one wave's values (r, c, k), and its derivatives."""

    values: Tensor
    unit: Tensor
    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(values: Tensor, eps: float) -> "_Norm":
        return _Norm(values, *torch.native_layer_norm(values, values.shape[-1:], None, None, eps))

    def pull(self, x: Tensor) -> Tensor:
        """r (x − mean x − ẑ mean(x ⊙ ẑ)): a gradient with respect to ẑ as one with respect to z."""
        shape = self.values.shape[-1:]
        needs = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(
            x, self.values, shape, self.mean, self.scale, None, None, needs
        )[0]


@dataclass
class _Wave:
    """The pieces that are trained on at once: as many as there are sequences with so many pieces."""

    pieces: slice
    states: slice
    first: bool


def _waves(pieces: int, rows: int, counts: Tensor | None) -> Iterator[_Wave]:
    """Wave by wave; `counts` are the sequences' pieces, largest first."""
    if counts is None:
        sizes = [rows] * (pieces // rows)
    else:
        numbers = counts.tolist()
        sizes = [sum(n > j for n in numbers) for j in range(numbers[0])]
    begin = 0
    for size in sizes:
        yield _Wave(slice(begin, begin + size), slice(0, size), begin == 0)
        begin += size


class _Loop:
    """One call's inputs, and its pieces and weights seen wave by wave: heads of all rows along dimension 0."""

    def __init__(self, x, offset, affine, coef, coef_s, gates, counts, rows, hidden, eps):
        self.x, self.offset, self.coef, self.coef_s, self.gates = x, offset, coef, coef_s, gates
        self.affine = affine
        self.size, self.hidden, self.eps = x.shape[-1] - 1, hidden or None, eps
        self.waves = list(_waves(x.shape[0], rows, counts))

    def layers(self, flat: Tensor, index: slice) -> list[Tensor]:
        return layers_of(flat[index].flatten(0, 1), self.size, self.hidden)

    def gate(self, which: int, wave: _Wave) -> Tensor:
        """keep, feed or hold: (r, 1, 1)."""
        return self.gates[wave.pieces, :, which].flatten()[:, None, None]

    def at(self, x: Any, wave: _Wave) -> Tensor:
        return x[wave.pieces].flatten(0, 1)

    def target(self, wave: _Wave, norm: _Norm) -> Tensor:
        """U, the gradient with respect to the normalised values."""
        u = norm.unit.unflatten(0, (-1, self.affine.shape[0])) * self.affine[:, None]
        return u.add_(self.offset[wave.pieces]).flatten(0, 1)


def _train(
    layers: list[Tensor], loop: _Loop, wave: _Wave, x: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each layer's inputs and gradient D at the weights `layers`, and the hidden values, if any."""
    z = torch.bmm(x, layers[0])
    if len(layers) == 1:
        norm = _Norm.of(z, loop.eps)
        return [x], [norm.pull(loop.target(wave, norm))], []
    a = with_one(F.gelu(z))
    norm = _Norm.of(torch.bmm(a, layers[1]), loop.eps)
    second = norm.pull(loop.target(wave, norm))
    slope, _ = gelu_slopes(z)
    return [x, a], [torch.bmm(second, layers[1][:, :-1].mT).mul_(slope), second], [z]


@custom_op("omnimix::test_time_inner")
def inner(
    x: Tensor,
    offset: Tensor,
    affine: Tensor,
    coef: Tensor,
    coef_s: Tensor | None,
    gates: Tensor | None,
    start: Tensor,
    now: Tensor,
    momentum: Tensor | None,
    counts: Tensor | None,
    hidden: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loop forward.

    Args:
        x: X̃, (m, h, c, k + 1): pieces in the order of the waves.
        offset: (m, h, c, k).
        affine: (h, k).
        coef, coef_s: (m, h, c); `coef_s` with momentum only.
        gates: keep, feed, hold, (m, h, 3); None where there is neither decay nor momentum.
        start, now, momentum: weights at the start of the first mini-batch, now, and S, (n, h, p).
        counts: pieces of each sequence, largest first; None where all have m / n.
        hidden: m, or 0.
        eps: of LN.

    Returns:
        D of the last layer (m, h, c, k); hidden values and D of the first of two layers (m, h, c, hidden); W° and S
        before each piece (m, h, p); W and S after the last (n, h, p). Those that do not exist are empty.
    """
    outputs = _shapes(x, offset, affine, coef, coef_s, gates, start, now, momentum, counts, hidden, eps)
    last, values, first, used, fed, final, final_s = outputs
    loop = _Loop(x, offset, affine, coef, coef_s, gates, counts, start.shape[0], hidden, eps)
    final.copy_(now)
    if momentum is not None:
        final_s.copy_(momentum)
    for wave in loop.waves:
        used[wave.pieces] = start if wave.first else final[wave.states]
        if momentum is not None:
            fed[wave.pieces] = final_s[wave.states]
        inputs, gradients, zs = _train(loop.layers(used, wave.pieces), loop, wave, loop.at(x, wave))
        weights = loop.layers(final, wave.states)
        for layer, x_in, d in zip(weights, inputs, gradients, strict=True):
            if gates is not None:
                layer.mul_(loop.gate(0, wave))
            layer.baddbmm_((x_in * loop.at(coef, wave)[..., None]).mT, d)
        if momentum is not None:
            steps = loop.layers(final_s, wave.states)
            for layer, step, x_in, d in zip(weights, steps, inputs, gradients, strict=True):
                layer.addcmul_(step, loop.gate(1, wave))
                step.mul_(loop.gate(2, wave)).baddbmm_((x_in * loop.at(coef_s, wave)[..., None]).mT, d)
        last[wave.pieces] = gradients[-1].view_as(last[wave.pieces])
        if zs:
            values[wave.pieces] = zs[0].view_as(values[wave.pieces])
            first[wave.pieces] = gradients[0].view_as(first[wave.pieces])
    # Pieces after the last wave are empty places of the table.
    end = loop.waves[-1].pieces.stop
    for output in (last, values, first, used, fed):
        output[end:] = 0
    return outputs


@inner.register_fake
def _shapes(x, offset, affine, coef, coef_s, gates, start, now, momentum, counts, hidden, eps):
    m, h, c, _ = x.shape
    n, _, p = start.shape
    middle = (m, h, c, hidden) if hidden else (0,)
    fed = (m, h, p) if momentum is not None else (0,)
    final_s = (n, h, p) if momentum is not None else (0,)
    shapes = (tuple(offset.shape), middle, middle, (m, h, p), fed, (n, h, p), final_s)
    return tuple(x.new_empty(shape) for shape in shapes)


@dataclass
class _Adjoint:
    """Gradients as the backward pass collects them: of the weights and S that flow through time, and of the inputs."""

    weights: Tensor
    momentum: Tensor | None
    start: Tensor
    x: Tensor
    offset: Tensor
    affine: Tensor
    coef: Tensor
    coef_s: Tensor | None
    gates: Tensor | None


def _through_update(
    loop: _Loop, wave: _Wave, adjoint: _Adjoint, inputs: list[Tensor], gradients: list[Tensor], of: list[Tensor]
) -> list[Tensor]:
    """The gradients of the layers' inputs, from what became of the weights; those of D are added to `of`."""
    r, c = inputs[0].shape[:2]
    of_inputs: list[Any] = [None] * len(inputs)
    flows: list[Any] = [(adjoint.weights, loop.coef, adjoint.coef)]
    if adjoint.momentum is not None:
        flows.append((adjoint.momentum, loop.coef_s, adjoint.coef_s))
    for flat, coef, into in flows:
        weight = loop.at(coef, wave)[..., None]
        total = coef.new_zeros(r, c)
        for i, through in enumerate(loop.layers(flat, wave.states)):
            g = torch.bmm(inputs[i], through)
            total += (g * gradients[i]).sum(-1)
            of[i].addcmul_(g, weight)
            back = torch.bmm(gradients[i] * weight, through.mT)
            of_inputs[i] = back if of_inputs[i] is None else of_inputs[i].add_(back)
        into[wave.pieces] = total.view_as(into[wave.pieces])
    return of_inputs


def _through_norm(loop: _Loop, wave: _Wave, adjoint: _Adjoint, norm: _Norm, d: Tensor, of: Tensor) -> Tensor:
    """The gradient of the last layer's values, from that of D, `of`."""
    u, heads = loop.target(wave, norm), loop.affine.shape[0]
    of_u = norm.pull(of)
    adjoint.offset[wave.pieces] = of_u.unflatten(0, (-1, heads))
    adjoint.affine += (of_u * norm.unit).sum(1).unflatten(0, (-1, heads)).sum(0)
    of_unit = (of_u.unflatten(0, (-1, heads)) * loop.affine[:, None]).flatten(0, 1)
    of_unit -= norm.scale * torch.addcmul(
        of * (u * norm.unit).mean(-1, keepdim=True), u, (of * norm.unit).mean(-1, keepdim=True)
    )
    return norm.pull(of_unit).addcmul_(norm.unit, norm.scale * (of * d).mean(-1, keepdim=True), value=-1)


def _wave_backward(
    loop: _Loop,
    wave: _Wave,
    adjoint: _Adjoint,
    used: Tensor,
    values: list[Tensor],
    gradients: list[Tensor],
    of: list[Tensor],
) -> list[Tensor]:
    """The gradients of W° by layer.

    Args:
        used: W°.
        values: hidden values and, after them, the gradient that reaches them from outside; unused in the linear model.
        gradients: D of each layer.
        of: the gradients that reach them from outside.
    """
    layers, x = loop.layers(used, wave.pieces), loop.at(loop.x, wave)
    if len(layers) == 1:
        norm = _Norm.of(torch.bmm(x, layers[0]), loop.eps)
        (of_x,) = _through_update(loop, wave, adjoint, [x], gradients, of)
        of_z = _through_norm(loop, wave, adjoint, norm, gradients[0], of[0])
        adjoint.x[wave.pieces] = of_x.baddbmm_(of_z, layers[0].mT).view_as(adjoint.x[wave.pieces])
        return [torch.bmm(x.mT, of_z)]
    z, of_z = values
    a, weight = with_one(F.gelu(z)), layers[1][:, :-1]
    norm = _Norm.of(torch.bmm(a, layers[1]), loop.eps)
    of_x, of_a = _through_update(loop, wave, adjoint, [x, a], gradients, of)
    slope, curve = gelu_slopes(z)
    of_z = torch.addcmul(of_z, curve.mul_(of[0]), torch.bmm(gradients[1], weight.mT))
    of_back = of[0] * slope
    of[1].baddbmm_(of_back, weight)
    of_last = _through_norm(loop, wave, adjoint, norm, gradients[1], of[1])
    of_second = torch.bmm(a.mT, of_last)
    of_second[:, :-1].baddbmm_(of_back.mT, gradients[1])
    of_z.addcmul_(of_a.baddbmm_(of_last, layers[1].mT)[..., :-1], slope)
    adjoint.x[wave.pieces] = of_x.baddbmm_(of_z, layers[0].mT).view_as(adjoint.x[wave.pieces])
    return [torch.bmm(x.mT, of_z), of_second]


def _through_state(loop: _Loop, wave: _Wave, adjoint: _Adjoint, before: Tensor, fed: Any, of_fed: Any) -> None:
    """The gradients of the gates; then those of W and S before the piece, along the gates only."""
    if loop.gates is None or adjoint.gates is None:
        return
    gates, of_gates = loop.gates[wave.pieces], adjoint.gates[wave.pieces]
    weights = adjoint.weights[wave.states]
    of_gates[..., 0] = (weights * before).sum(-1)
    if adjoint.momentum is not None:
        steps = adjoint.momentum[wave.states]
        of_gates[..., 1] = (weights * fed).sum(-1)
        of_gates[..., 2] = (steps * fed).sum(-1)
        steps.mul_(gates[..., 2:]).addcmul_(weights, gates[..., 1:2]).add_(of_fed)
    weights.mul_(gates[..., :1])


@custom_op("omnimix::test_time_inner_backward")
def inner_backward(
    dlast: Tensor,
    dvalues: Tensor,
    dfirst: Tensor,
    dused: Tensor,
    dfed: Tensor,
    dfinal: Tensor,
    dfinal_s: Tensor,
    last: Tensor,
    values: Tensor,
    first: Tensor,
    used: Tensor,
    fed: Tensor,
    x: Tensor,
    offset: Tensor,
    affine: Tensor,
    coef: Tensor,
    coef_s: Tensor | None,
    gates: Tensor | None,
    start: Tensor,
    now: Tensor,
    momentum: Tensor | None,
    counts: Tensor | None,
    hidden: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `inner`'s tensors in their order, from those of its outputs and its first five outputs."""
    into = _gradients_like(x, offset, affine, coef, coef_s, gates, start, now, momentum)
    dx, doffset, daffine, dcoef, dcoef_s, dgates, dstart, dnow, dmomentum = into
    for gradient in (dx, doffset, daffine, dcoef, dcoef_s, dgates):
        gradient.zero_()
    dnow.copy_(dfinal)
    if momentum is not None:
        dmomentum.copy_(dfinal_s)
    loop = _Loop(x, offset, affine, coef, coef_s, gates, counts, start.shape[0], hidden, eps)
    with_s = momentum is not None
    of_steps = (dmomentum, dcoef_s) if with_s else (None, None)
    of_gates = None if gates is None else dgates
    adjoint = _Adjoint(dnow, of_steps[0], dstart, dx, doffset, daffine, dcoef, of_steps[1], of_gates)
    for wave in reversed(loop.waves):
        two = [(first, dfirst)] if hidden else []
        gradients = [loop.at(d, wave) for d, _ in [*two, (last, dlast)]]
        of = [loop.at(d, wave).clone() for _, d in [*two, (last, dlast)]]
        hidden_values = [loop.at(values, wave), loop.at(dvalues, wave)] if hidden else []
        of_used = _wave_backward(loop, wave, adjoint, used, hidden_values, gradients, of)
        before = now if wave.first else used[wave.pieces]
        fed_here = (fed[wave.pieces], dfed[wave.pieces]) if with_s else (None, None)
        _through_state(loop, wave, adjoint, before, *fed_here)
        target = adjoint.weights
        if wave.first:
            target = adjoint.start.zero_()
        for layer, g in zip(loop.layers(target, wave.states), of_used, strict=True):
            layer += g
        target[wave.states] += dused[wave.pieces]
    return into


def _gradients_like(x: Tensor, *others: Tensor | None) -> Any:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *others))


@inner_backward.register_fake
def _(*arguments):
    return _gradients_like(*arguments[12:21])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.hidden, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[:5])


def _differentiate(ctx, *grads):
    x, offset, affine, coef, coef_s, gates, start, now, momentum, counts, *outputs = ctx.saved_tensors
    tensors = (x, offset, affine, coef, coef_s, gates, start, now, momentum)
    found = inner_backward(*(g.contiguous() for g in grads), *outputs, *tensors, counts, ctx.hidden, ctx.eps)
    return (*(None if t is None else g for t, g in zip(tensors, found, strict=True)), None, None, None)


inner.register_gradients(_differentiate, _save)
