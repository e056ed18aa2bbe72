"""From logits to the next tokens: filters, and draws that do not depend on what else is in the batch.

All filters take and give logits `(n, v)`; what they rule out is −∞.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import GenerationConfig


def penalise_repeats(logits: Float[Tensor, "n v"], seen: Bool[Tensor, "n v"], penalty: float) -> Float[Tensor, "n v"]:
    """Logits of seen tokens divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid(logits: Float[Tensor, "n v"], ids: Sequence[int]) -> Float[Tensor, "n v"]:
    """Without the tokens `ids`."""
    return logits.index_fill(1, torch.tensor(ids, device=logits.device, dtype=torch.int64), -torch.inf)


def keep_top_k(logits: Float[Tensor, "n v"], k: int) -> Float[Tensor, "n v"]:
    """The k largest, and what equals the last of them."""
    least = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Float[Tensor, "n v"], p: float) -> Float[Tensor, "n v"]:
    """The fewest most probable tokens that have probability p together, at least one (arXiv 1904.09751)."""
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # A token stays where those before it do not suffice. The first stays also where p is tiny.
    beyond = probabilities.cumsum(-1) - probabilities >= p
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def keep_min_p(logits: Float[Tensor, "n v"], p: float) -> Float[Tensor, "n v"]:
    """Tokens with at least p times the largest probability (arXiv 2407.01082, section 3)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def permitted(
    logits: Float[Tensor, "n v"], config: GenerationConfig, seen: Bool[Tensor, "n v"] | None
) -> Float[Tensor, "n v"]:
    """Logits after the penalty and without forbidden tokens."""
    if seen is not None:
        logits = penalise_repeats(logits, seen, config.repetition_penalty)
    return forbid(logits, config.forbidden) if config.forbidden else logits


def filtered(
    logits: Float[Tensor, "n v"], config: GenerationConfig, seen: Bool[Tensor, "n v"] | None
) -> Float[Tensor, "n v"]:
    """Logits from which a token is drawn, where the temperature is not 0."""
    logits = permitted(logits, config, seen) / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return logits if config.min_p is None else keep_min_p(logits, config.min_p)


def distribution(
    logits: Float[Tensor, "n v"], config: GenerationConfig, seen: Bool[Tensor, "n v"] | None
) -> Float[Tensor, "n v"]:
    """The probabilities with which the next token is chosen, float64; one at the best token where this is greedy."""
    if config.temperature:
        return filtered(logits, config, seen).double().softmax(-1)
    best = permitted(logits, config, seen).argmax(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float64).scatter(1, best, 1.0)


def generator(seed: int, sample_id: int) -> torch.Generator:
    """The source of a sequence's draws, on the CPU: the same on every device."""
    digest = hashlib.blake2b(f"{seed} {sample_id}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw(probabilities: Float[Tensor, "n v"], generators: Sequence[torch.Generator]) -> Int[Tensor, " n"]:
    """One token a row, by its own generator: the first whose cumulative probability exceeds a uniform number."""
    uniform = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
    total = probabilities.double().cumsum(-1)
    uniform = uniform.to(total.device) * total[:, -1:]
    return torch.searchsorted(total, uniform, right=True)[:, 0].clamp(max=total.shape[1] - 1)


def seen_tokens(sequences: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Bool[Tensor, "n v"]:
    """Which tokens each sequence holds."""
    seen = torch.zeros(len(sequences), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, sequences, strict=True):
        row[torch.tensor(ids, dtype=torch.int64)] = True
    return seen.to(device)


class Sampler:
    """Chooses the next tokens of a batch of sequences.

    Args:
        config: how.
        prompts: what the sequences begin with.
        sample_ids: by which, with the seed, each sequence draws.
        vocab_size: tokens.
        device: of the logits.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ):
        self.config = config
        self.generators = [generator(config.seed, n) for n in sample_ids] if config.temperature else []
        self.seen = seen_tokens(prompts, vocab_size, device) if config.repetition_penalty != 1 else None

    def choose(self, logits: Float[Tensor, "n v"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The next tokens, and their log-probabilities before any filter or temperature."""
        if self.config.temperature:
            chosen = draw(filtered(logits, self.config, self.seen).softmax(-1, dtype=torch.float64), self.generators)
        else:
            chosen = permitted(logits, self.config, self.seen).argmax(-1)
        column = chosen[:, None]
        log_prob = logits.gather(1, column)[:, 0] - logits.logsumexp(-1)
        if self.seen is not None:
            self.seen.scatter_(1, column, True)
        return chosen, log_prob

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences only."""
        if self.generators:
            self.generators = [self.generators[i] for i in rows]
        if self.seen is not None:
            self.seen = self.seen[list(rows)]
