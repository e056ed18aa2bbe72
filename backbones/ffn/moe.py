"""Mixture of experts: each token goes through the few SwiGLU experts that its router chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import grouped_mm
from ...kernels.grouped_mm import combine, dispatch, route
from ...utils.modes import autocast_enabled, own_precision, transforming
from ..config import FFNConfig, Site, bounded, not_negative, positive
from ..context import Context
from ..layer import Output
from ..linear import apply_wide
from ..parameters import linear_std
from ..state import State
from .base import FFN, register_ffn
from .mlp import SwiGLU, SwiGLUConfig

# Keeps the weights of experts whose sigmoids have all underflowed finite.
LEAST = 1e-20


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FFNConfig):
    """Options of `moe`.

    With the defaults a token passes as many products as in a dense `swiglu`. Fine-grained experts (DeepSeekMoE) are
    more of them, more of them active, and a smaller ratio.

    Args:
        experts: how many there are to choose from.
        active: how many a token passes.
        ratio: hidden channels of one expert per channel.
        shared: further experts, of the same size, that every token passes.
        router: "softmax" (Switch, Mixtral), balanced by a loss; or "sigmoid" (DeepSeek-V3), balanced by a bias on the
            choice alone, which moves when `rebalance` is called, after each step of the optimiser.
        normalise: whether the weights of a token's experts add up to 1; by default where there are several.
        scale: factor on the routed experts' sum; the shared experts' is not scaled.
        balance: coefficient of the load-balancing loss ("softmax").
        z_loss: coefficient of the loss that keeps the router's logits small ("softmax").
        bias_rate: by how much `rebalance` moves a bias ("sigmoid").
    """

    experts: int = 8
    active: int = 2
    ratio: float = 4 / 3
    shared: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool | None = None
    scale: float = 1.0
    balance: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        positive(self, "experts", "active", "ratio")
        if self.active > self.experts:
            raise ConfigError(f"MoEConfig.active is {self.active}; there are {self.experts} experts to choose from")
        if self.normalise and self.active == 1:
            raise ConfigError("MoEConfig.normalise is True with one active expert: its weight would always be 1")
        not_negative(self, "shared", "balance", "z_loss", "bias_rate")
        bounded(self, "scale")


class _Experts(nn.Module):
    """One linear layer per expert, as one tensor (experts, in, out)."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs))
        # As the linear layers of a backbone.
        nn.init.trunc_normal_(self.weight, std=linear_std(inputs))

    def forward(self, rows: Float[Tensor, "m d"], counts: Int[Tensor, " e"]) -> Float[Tensor, "m f"]:
        device = rows.device.type
        # Of torch's own layers autocast takes care.
        dtype = torch.get_autocast_dtype(device) if autocast_enabled(device) else self.weight.dtype
        return grouped_mm(rows.to(dtype), self.weight.to(dtype), counts)


@register_ffn(
    "moe",
    MoEConfig,
    summary="the top k of many SwiGLU experts, and shared ones",
    source="arXiv 2101.03961, 2401.04088, 2401.06066, 2412.19437",
    examples=(
        MoEConfig(experts=4, ratio=0.75),
        MoEConfig(experts=3, active=1, ratio=0.5, balance=0.0, z_loss=0.0),
        MoEConfig(experts=6, active=3, ratio=0.25, shared=2, router="sigmoid", scale=2.5),
    ),
)
class MoE(FFN):
    """y = scale · Σ_{i in top k} w_i E_i(x) + Σ_shared E_j(x), where E(x) = W₂ (swish(W₁ x) ⊙ W₃ x).

    softmax: w is the softmax of the router's logits (arXiv 2101.03961, eq. 1), normalised over the chosen (Mixtral,
    arXiv 2401.04088). sigmoid: w is their sigmoid, normalised over the chosen, and the choice is the top k of the
    sigmoid plus a bias (arXiv 2412.19437, eq. 12 to 16). No token is dropped, so each depends on itself alone.

    The losses are weighted already: "load_balance" is N Σ_i f_i P_i (arXiv 2101.03961, eq. 4 to 6, with f a part of all
    choices: 1 where they are even), "router_z" the mean squared log-sum-exp (ST-MoE, arXiv 2202.08906, eq. 5).

    The buffer `load` counts the tokens of each expert since the last `rebalance`, since the module last went from
    training to evaluation or back, or since it was loaded.
    """

    load: Tensor
    bias: Tensor

    def __init__(self, dim: int, config: MoEConfig, site: Site):
        super().__init__()
        self.config = config
        self.normalise = config.active > 1 if config.normalise is None else config.normalise
        hidden = max(8, round(dim * config.ratio / 8) * 8)
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.in_proj = _Experts(config.experts, dim, 2 * hidden)
        self.out_proj = _Experts(config.experts, hidden, dim)
        # Several experts that every token passes are one wide one.
        self.shared = SwiGLU(dim, SwiGLUConfig(ratio=config.shared * hidden / dim), site) if config.shared else None
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64), persistent=False)
        # It is no part of a checkpoint: new weights begin a new count.
        self.register_load_state_dict_post_hook(_count_anew)
        if config.router == "sigmoid":
            # Float32 whatever the module's dtype; see `_apply`.
            self.register_buffer("bias", torch.zeros(config.experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "b t d"], context: Context, state: State | None = None) -> Output:
        tokens = x.flatten(0, 1)
        logits = self._logits(tokens)
        chosen, weight, probability = self._choose(logits)
        to = route(chosen, self.config.experts)
        # Within a transform of torch.func the counts are its own.
        if not transforming():
            with torch.no_grad():
                self.load.add_(to.counts)
        gate, value = self.in_proj(dispatch(tokens, to), to.counts).chunk(2, dim=-1)
        y = combine(self.out_proj(F.silu(gate) * value, to.counts), weight, to).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, context).y
        return Output(y, losses=self._losses(logits, probability, to.counts))

    def _logits(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        # A choice among experts is a step: rounding moves it, so that nothing here is rounded.
        with own_precision(tokens.device.type):
            return apply_wide(self.router, tokens.to(wide))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The experts of each token and their weights (n, k), and all experts' scores (n, e)."""
        if self.config.router == "softmax":
            scores = logits.softmax(-1)
            weight, chosen = scores.topk(self.config.active, dim=-1)
        else:
            scores = logits.sigmoid()
            chosen = (scores + self.bias).topk(self.config.active, dim=-1).indices
            weight = scores.gather(1, chosen)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(LEAST)
        return chosen, weight * self.config.scale, scores

    def _losses(self, logits: Tensor, probability: Tensor, counts: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if not logits.shape[0]:
            # A mean over no tokens is no number.
            return losses
        if self.config.router == "softmax" and self.config.balance:
            share = counts.to(logits.dtype) / (logits.shape[0] * self.config.active)
            even = self.config.experts * (share * probability.mean(0)).sum()
            losses["load_balance"] = self.config.balance * even
        if self.config.router == "softmax" and self.config.z_loss:
            losses["router_z"] = self.config.z_loss * logits.logsumexp(-1).square().mean()
        return losses

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move the bias of each expert by one step towards the mean load (arXiv 2412.19437, 2.1.2), and count anew."""
        if self.config.router == "sigmoid":
            load = self.load.clone()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load)
            # Compared without a division, so that an even load moves nothing.
            self.bias += self.config.bias_rate * (load.sum() - load * load.shape[0]).sign()
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        before = self.bias if self.config.router == "sigmoid" else None
        super()._apply(fn, recurse)
        if before is not None and self.bias.dtype != before.dtype:
            # A choice among experts is a step: half precision would move it.
            self.bias = before.to(self.bias.device)
        return self

    def upgrade_state(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Bring what earlier versions wrote up to date: the bias in whole steps of its rate."""
        if (steps := state_dict.pop(f"{prefix}steps", None)) is not None:
            state_dict[f"{prefix}bias"] = self.config.bias_rate * steps.float()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest, **options) -> None:
        self.upgrade_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def train(self, mode: bool = True) -> MoE:
        if mode != self.training:
            self.load.zero_()
        return super().train(mode)


def _count_anew(module: MoE, incompatible: object) -> None:
    module.load.zero_()


def rebalance(module: nn.Module) -> None:
    """Let every `moe` within `module` balance its experts; call it after each step of the optimiser.

    Biases move by the load of the whole step, whatever the number of passes that it took and however often
    checkpointing has run them.
    """
    for layer in module.modules():
        if isinstance(layer, MoE):
            layer.rebalance()


def expert_loads(module: nn.Module) -> dict[str, Int[Tensor, " e"]]:
    """The tokens that each expert has had, by the name of the `moe` within `module`; see `MoE` for since when."""
    return {name: layer.load.clone() for name, layer in module.named_modules() if isinstance(layer, MoE)}
