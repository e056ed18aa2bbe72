"""Mixture-of-depths: a router decides which tokens go through a block; the others skip it (arXiv 2404.02258)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ..block import added
from ..config import INHERIT, BlockConfig, Site, positive, proportion
from ..context import Context
from ..layer import Capabilities, Output, SequenceLayer
from ..layout import Layout
from ..state import State
from .base import WrapperConfig, inner_block, register_wrapper


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig(WrapperConfig):
    """Options of `mixture_of_depths`, for blocks with residual="none" and no ffn of their own.

    Args:
        block: what chosen tokens go through; a mixer, an ffn, or both.
        capacity: fraction of a sequence's tokens that is chosen in training, in (0, 1].
        predictor_loss: coefficient of the loss of the predictor, which chooses in evaluation.
    """

    block: BlockConfig
    capacity: float = 0.125
    predictor_loss: float = 0.01

    def __post_init__(self) -> None:
        positive(self, "predictor_loss")
        proportion(self, "capacity")
        if self.block.ffn == INHERIT:
            raise ConfigError("MixtureOfDepthsConfig.block has no ffn; name one, or None")


@register_wrapper(
    "mixture_of_depths",
    MixtureOfDepthsConfig,
    summary="a block for the tokens that a router chooses; the others skip it",
    source="arXiv 2404.02258",
    examples=(),
)
class MixtureOfDepths(SequenceLayer):
    """x_i + r_i (block(x)_i − x_i) for chosen tokens, x_i for the others (eq. 1), where r = σ(w x).

    In training the tokens with the highest r of each sequence are chosen, which is not causal; a predictor learns to
    tell from the token alone whether it is among them, and chooses in evaluation (section 3.5), where the layer is
    causal.
    """

    def __init__(self, dim: int, config: MixtureOfDepthsConfig, site: Site):
        super().__init__()
        self.config = config
        self.block = inner_block(dim, config.block, site)
        if self.block.first.stream != "tokens":
            raise ConfigError(
                f"MixtureOfDepthsConfig.block has the residual form {config.block.residual!r}, whose stream is "
                f"{self.block.first.stream}; what the block adds to tokens needs one whose stream is tokens, such as "
                "'pre'"
            )
        self.router = nn.Linear(dim, 1, bias=False)
        self.predictor = nn.Linear(dim, 1)
        own = self.block.capabilities
        # A bounded receptive field counts tokens of the whole sequence, and the block sees chosen ones.
        field = 1 if own.receptive_field == 1 else None
        # What the block shares is of chosen tokens only, and later layers need all.
        changed = {"blockwise": False, "receptive_field": field, "writes": frozenset()}
        self.capabilities = Capabilities(**{**vars(own), **changed})

    def forward(self, x: Tensor, context: Context | Layout, state: State | None = None) -> Output:
        context, losses = Context.of(context), {}
        logits, guess = self.router(x)[..., 0], self.predictor(x.detach())[..., 0]
        if self.training:
            chosen = self._top(logits, context.layout)
            target = torch.zeros_like(guess).scatter(1, chosen, 1.0) if chosen.dtype != torch.bool else chosen.to(guess)
            # A mean over no tokens is no number.
            if guess.numel():
                miss = F.binary_cross_entropy_with_logits(guess, target)
                losses["depth_predictor"] = self.config.predictor_loss * miss
        else:
            chosen = guess > 0
        tokens, inner = context.take(chosen, x)
        out = self.block(tokens, inner, state)
        weight, _ = context.take(chosen, logits[..., None])
        change = (out.y - tokens) * weight.sigmoid()
        if chosen.dtype == torch.bool:
            y = x.masked_scatter(chosen[..., None], (tokens + change).to(x.dtype))
        else:
            y = x.scatter_add(1, chosen[..., None].expand_as(change), change.to(x.dtype))
        return Output(y, out.state, added(losses, out.losses))

    def _top(self, logits: Tensor, layout: Layout) -> Tensor:
        """The tokens with the highest logits: an index (b, k), ascending; of packed sequences a mask (b, t)."""
        if layout.cu_seqlens is None:
            k = min(logits.shape[1], math.ceil(logits.shape[1] * self.config.capacity))
            return logits.topk(k, dim=1).indices.sort(dim=1).values
        sequence, lengths = layout.sequence_of(logits)[0], layout.lengths(logits)
        order = logits[0].argsort(descending=True)
        order = order[sequence[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - layout.cu_seqlens.long()[sequence[order]]
        return (rank < (lengths * self.config.capacity).ceil()[sequence])[None]

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State | None:
        return self.block.init_state(batch, device=device, dtype=dtype)

    def residual_outputs(self) -> list[nn.Module]:
        return self.block.residual_outputs()

    def residual_branches(self) -> int:
        return self.block.residual_branches()
