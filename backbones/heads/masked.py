"""Masked diffusion: hidden tokens from those that are left (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from ..config import fraction, not_negative
from ..layer import Capabilities
from ..layout import Layout, offsets, pack_rows
from .denoiser import Denoiser, DenoiserConfig
from .noise import (
    LEAST_LEVEL,
    draw_subsets,
    even,
    generator_of,
    noise_levels,
    paired_error,
    scored_tokens,
)
from .objective import Likelihood, ObjectiveLoss, register_objective

if TYPE_CHECKING:
    from ..language import LanguageModel

# Tokens in one forward pass of an estimated likelihood.
TOKENS_AT_A_TIME = 16384


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(DenoiserConfig):
    """Options of `masked`, with those of every denoiser.

    Args:
        eps: the least masking probability that is trained on, which bounds the weight 1/t.
        stratified: the sequences of a batch share out the range of masking probabilities among them.
        complementary: each sequence is seen twice, the second time with just the other tokens masked, so that every
            token is predicted (LaViDa, arXiv 2505.16839, section 3.2).
        anneal_steps: over so many first training steps the model changes from causal to bidirectional; see
            `Masked.anneal`.
    """

    eps: float = LEAST_LEVEL
    stratified: bool = True
    complementary: bool = False
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        fraction(self, "eps")
        if self.complementary and self.eps >= 0.5:
            raise ConfigError(f"{type(self).__name__}.eps is {self.eps}; with complementary it must be below 0.5")
        not_negative(self, "anneal_steps")


@register_objective(
    "masked",
    MaskedConfig,
    summary="masked tokens from those around them, at every masking rate",
    source="arXiv 2406.07524, 2502.09992",
    examples=(MaskedConfig(), MaskedConfig(complementary=True, shift=True)),
)
class Masked(Denoiser):
    """∫ (1/t) Σ_masked −log p(token | tokens not masked) dt, a bound on −log p of all of them.

    Each sequence draws t, each of its scored tokens is replaced by the mask token with probability t. The first token
    of a sequence is given and never masked; so are tokens that are not counted. The model is not told t (arXiv
    2406.03736 shows that it need not be).
    """

    config: MaskedConfig

    def __init__(self, dim: int, vocab_size: int, config: MaskedConfig):
        super().__init__(dim, vocab_size, config)
        self.annealed = 0.0 if config.anneal_steps else 1.0

    def serves(self, can: Capabilities) -> bool:
        return can.bidirectional and (can.blockwise or not self.config.anneal_steps)

    def anneal(self, step: int) -> None:
        """Say which training step comes next: where `anneal_steps` is set, how far the model looks ahead.

        A token sees what came before and its own block of T^(step / anneal_steps) tokens, of T in the longest
        sequence: none but itself at step 0, as the autoregressive model did, the whole sequence from step
        `anneal_steps` on. Evaluation is always bidirectional. (DiffuLLaMA, arXiv 2410.17891, section 3.3, opens single
        entries of the mask instead; blocks are what every mixer of omnimix can do.)
        """
        if self.config.anneal_steps:
            self.annealed = min(1.0, step / self.config.anneal_steps)

    def layout(self, longest: int, cu_seqlens: Tensor | None, *, training: bool = False) -> Layout:
        """Under what the model reads sequences."""
        if not training or self.annealed >= 1:
            return Layout(causal=False, cu_seqlens=cu_seqlens)
        return Layout(causal="block", block=max(1, round(longest**self.annealed)), cu_seqlens=cu_seqlens)

    def loss(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> ObjectiveLoss:
        scored = scored_tokens(tokens, cu_seqlens, lengths, counted)
        if lengths is not None:
            tokens, scored, cu_seqlens = pack_rows(tokens, lengths), pack_rows(scored, lengths), offsets(lengths)
        config = self.config
        n = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
        high = 1 - config.eps if config.complementary else 1.0
        levels = noise_levels(n, tokens.device, low=config.eps, high=high, stratified=config.stratified)
        rate = levels[Layout(causal=False, cu_seqlens=cu_seqlens).sequence_of(tokens)]
        masked = scored & (torch.rand_like(rate) < rate)
        if config.complementary:
            masked, rate, tokens, cu_seqlens = _doubled(masked, scored & ~masked, rate, tokens, cu_seqlens)
        longest = tokens.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
        layout = self.layout(longest, cu_seqlens, training=model.training)
        out = model.hidden(tokens.masked_fill(masked, model.mask_token), layout)
        nats = self.token_nats(model, self._outputs(out.y, masked), tokens[masked])
        bound = (nats / rate[masked]).sum() / (2 if config.complementary else 1)
        if not nats.numel():
            # Nothing was masked: the estimate is 0, and a backward pass still has its path.
            bound = out.y.sum() * 0
        count = int(scored.sum())
        loss = bound / count
        parts = {"bound": loss.detach()}
        for name, extra in out.losses.items():
            parts[name] = extra.detach()
            loss = loss + extra
        return ObjectiveLoss(loss=loss, nats=bound.detach(), count=count, parts=parts)

    def _outputs(self, y: Float[Tensor, "b t d"], masked: Bool[Tensor, "b t"]) -> Float[Tensor, "n d"]:
        """The backbone's outputs where the masked tokens are predicted."""
        # The first token of a sequence is never masked, hence the place before is in the same one.
        return y[masked.roll(-1, 1)] if self.shift else y[masked]

    @torch.no_grad()
    def log_likelihood(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
        samples: int = 32,
        seed: int = 0,
    ) -> Likelihood:
        """An estimate of the bound with its standard error.

        A row's draws depend on the seed and its tokens alone, so that its estimate is the same in every batch.
        `samples` is rounded up to an even number: they are drawn in pairs, stratified by how many tokens are masked.
        """
        samples = even(samples)
        scored = scored_tokens(tokens, None, lengths, counted)
        nats, errors = [], []
        for i, row in enumerate(tokens):
            length = len(row) if lengths is None else int(lengths[i])
            values = self._sampled_nats(model, row[:length], scored[i, :length], samples, seed)
            nats.append(values.mean())
            errors.append(paired_error(values))
        return Likelihood(nats=torch.stack(nats), error=torch.stack(errors), samples=samples, bound=True)

    def _sampled_nats(
        self, model: LanguageModel, row: Int[Tensor, " t"], scored: Bool[Tensor, " t"], samples: int, seed: int
    ) -> Float[Tensor, " s"]:
        """Independent estimates of one sequence's bound."""
        places = scored.nonzero()[:, 0]
        if not len(places):
            return torch.zeros(samples, dtype=torch.float64)
        chosen, weight = draw_subsets(len(places), samples, generator_of(seed, row))
        masked = torch.zeros(samples, len(row), dtype=torch.bool, device=row.device)
        masked[:, places] = chosen.to(row.device)
        values = torch.zeros(samples, dtype=torch.float64, device=row.device)
        at_once = max(1, TOKENS_AT_A_TIME // len(row))
        for start in range(0, samples, at_once):
            part = masked[start : start + at_once]
            tokens = row.expand(part.shape)
            y = model.hidden(tokens.masked_fill(part, model.mask_token), self.layout(len(row), None)).y
            cost = self.token_nats(model, self._outputs(y, part), tokens[part]).double()
            values.index_add_(0, start + part.nonzero()[:, 0], cost)
        return values.cpu() * weight


def _doubled(
    masked: Tensor, others: Tensor, rate: Tensor, tokens: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Masks, rates, tokens and boundaries of a batch followed by itself with the complementary masks."""
    if cu_seqlens is None:
        return torch.cat([masked, others]), torch.cat([rate, 1 - rate]), tokens.repeat(2, 1), None
    boundaries = torch.cat([cu_seqlens, cu_seqlens[1:] + cu_seqlens[-1]])
    return torch.cat([masked, others], 1), torch.cat([rate, 1 - rate], 1), tokens.repeat(1, 2), boundaries
