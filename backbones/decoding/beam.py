"""Beam search: the best of several hypotheses that are written side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..language import LanguageModel
from .config import GenerationConfig
from .generate import Generation, Reason, finish_reason, start
from .prefill import advance, evaluating
from .prefix import Prefix
from .sampling import permitted, seen_tokens


@dataclass(frozen=True, kw_only=True)
class _Hypothesis:
    """What was written, its tokens' log-probabilities, and their sum as the search scores them."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    total: float = 0.0


@dataclass(kw_only=True)
class _Search:
    """The search after one prompt.

    Args:
        running: unfinished hypotheses, best first.
        finished: (score, hypothesis, reason) of those that do not, best first, at most as many as there are beams.
        over: whether nothing more is looked for.
    """

    running: list[_Hypothesis]
    finished: list[tuple[float, _Hypothesis, Reason]] = field(default_factory=list)
    over: bool = False

    def take(self, candidates: list[_Hypothesis], config: GenerationConfig) -> list[int]:
        """Take in the best 2 · beams continuations, best first; return the indices of the unfinished ones."""
        going, stopped = [], []
        for i, candidate in enumerate(candidates):
            reason = finish_reason(candidate.tokens, config)
            if reason is None:
                going.append(i)
            elif i < config.num_beams:
                stopped.append((candidate.total / len(candidate.tokens) ** config.length_penalty, candidate, reason))
        self.finished = sorted(self.finished + stopped, key=lambda f: -f[0])[: config.num_beams]
        going = going[: config.num_beams]
        self.running = [candidates[i] for i in going]
        self.over = not going
        if going and len(self.finished) == config.num_beams:
            best = self.running[0]
            self.over = best.total / len(best.tokens) ** config.length_penalty <= self.finished[-1][0]
        return going


def search(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, prefix: Prefix | None
) -> Generation:
    """The best text after each prompt by total log-probability over length ** length_penalty.

    Of every prompt's hypotheses the 2 · beams best continuations are looked at; one that ends is kept only if it is
    among the first `beams`. The search is over when as many are kept as there are beams and the best unfinished one is
    not better than the worst of them, each at its present length: what transformers does with early_stopping=False.
    """
    begin = time.perf_counter()
    before = [] if prefix is None else prefix.tokens
    with evaluating(model), torch.inference_mode():
        logits, state = start(model, prompts, config.chunk, prefix)
        device = logits.device
        searches = [_Search(running=[_Hypothesis()]) for _ in prompts]
        alive = list(range(len(prompts)))
        first = None
        while True:
            counts = [len(searches[i].running) for i in alive]
            whole = [before + prompts[i] + h.tokens for i in alive for h in searches[i].running]
            log_probs, scores = _scores(logits, whole, config)
            origins, tokens, offset = [], [], 0
            for i, count in zip(alive, counts, strict=True):
                rows = slice(offset, offset + count)
                candidates, sources = _continuations(
                    searches[i].running, log_probs[rows], scores[rows], config.num_beams
                )
                going = searches[i].take(candidates, config)
                if not searches[i].over:
                    origins += [offset + sources[j] for j in going]
                    tokens += [candidates[j].tokens[-1] for j in going]
                offset += count
            first = first or time.perf_counter()
            alive = [i for i in alive if not searches[i].over]
            if not alive:
                break
            state = state.select(torch.tensor(origins, device=device))
            logits, state = advance(model, torch.tensor(tokens, device=device), state)
    best = [s.finished[0] for s in searches]
    return Generation(
        tokens=[h.tokens for _, h, _ in best],
        log_probs=[h.log_probs for _, h, _ in best],
        reasons=[reason for _, _, reason in best],
        scores=[score for score, _, _ in best],
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(len(h.tokens) for _, h, _ in best),
        prefill_seconds=first - begin,
        decode_seconds=time.perf_counter() - first,
    )


def _scores(
    logits: Float[Tensor, "n v"], whole: list[list[int]], config: GenerationConfig
) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n v"]]:
    """Log-probabilities, and these after the penalty and without what is forbidden."""
    log_probs = logits.log_softmax(-1)
    penalised = config.repetition_penalty != 1
    seen = seen_tokens(whole, logits.shape[1], logits.device) if penalised else None
    return log_probs, permitted(log_probs, config, seen)


def _continuations(
    running: list[_Hypothesis], log_probs: Float[Tensor, "m v"], scores: Float[Tensor, "m v"], beams: int
) -> tuple[list[_Hypothesis], list[int]]:
    """The 2 · beams best continuations of one prompt's hypotheses, best first, and which each continues."""
    totals = torch.tensor([h.total for h in running], dtype=scores.dtype, device=scores.device)
    summed = (scores + totals[:, None]).flatten()
    best = summed.topk(min(2 * beams, summed.numel()))
    vocab_size = scores.shape[1]
    own = log_probs.flatten()[best.indices].tolist()
    candidates, sources = [], []
    for total, index, log_prob in zip(best.values.tolist(), best.indices.tolist(), own, strict=True):
        if total == -torch.inf:
            break
        source = running[index // vocab_size]
        candidates.append(
            _Hypothesis(
                tokens=[*source.tokens, index % vocab_size], log_probs=[*source.log_probs, log_prob], total=total
            )
        )
        sources.append(index // vocab_size)
    return candidates, sources
