"""Speculative decoding: a small model proposes several tokens, the large one checks them in one call.

Leviathan et al., arXiv 2211.17192, algorithm 1. What is written has exactly the large model's distribution; greedy, it
is the large model's text. A recurrent state cannot be cut back to the last token that was accepted: after a rejection
the model resumes from the state before the call and reads the accepted tokens again, together with the next proposals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedCall
from ...utils.renamed import renamed_options
from ..config import not_negative, positive
from ..language import LanguageModel
from ..state import State
from ..typed import Config
from .config import GenerationConfig
from .generate import Generation, Reason, finish_reason
from .prefill import CAUSAL, as_lists, check_decoder, evaluating, last_logits, read
from .sampling import distribution, draw, generator, seen_tokens


@renamed_options(ahead="num_assistant_tokens")
@dataclass(frozen=True, kw_only=True)
class SpeculationConfig(Config):
    """Options of `speculate`.

    Args:
        num_assistant_tokens: tokens that the draft model proposes at a time.
        again: accepted tokens that are read again with the next proposals; where there are more, they are read first,
            in a call of their own.
    """

    num_assistant_tokens: int = 4
    again: int = 8

    def __post_init__(self) -> None:
        positive(self, "num_assistant_tokens")
        not_negative(self, "again")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What was written, and how well the draft model guessed.

    Args:
        generation: as `generate` gives it.
        proposed: tokens that the draft model proposed.
        accepted: how many of these were taken.
        calls: of the large model, after the prompts.
    """

    generation: Generation
    proposed: int
    accepted: int
    calls: int

    @property
    def acceptance(self) -> float:
        """The share of proposals that were taken."""
        return self.accepted / max(1, self.proposed)


class _Reader:
    """A model at a place in a text: a state, and what was generated after it but not read into it yet."""

    def __init__(self, model: LanguageModel, prompt: list[int], config: GenerationConfig):
        self.model, self.device = model, model.embedding.weight.device
        self.unread: list[int] = [prompt[-1]]
        self.state: State | None = None
        self.calls = 0
        if prompt[:-1]:
            _, self.state = read(model, [prompt[:-1]], config.chunk)

    def look(self, tokens: list[int], state: State | None, count: int) -> tuple[Float[Tensor, "count v"], State]:
        """Read `tokens` from `state`: logits after each of the last `count`, and the state after all."""
        self.calls += 1
        ids = torch.tensor([tokens], device=self.device)
        out = self.model.backbone(self.model.embedding(ids), CAUSAL, state)
        return last_logits(self.model, out.y[0, -count:]), out.state


def speculate(
    model: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "n t"],
    config: GenerationConfig | None = None,
    speculation: SpeculationConfig | None = None,
) -> Speculation:
    """Continue each prompt, one after the other, as `generate` does, in fewer calls of `model`.

    Args:
        model: whose text it is.
        draft: a smaller model with the same vocabulary. The better it guesses, the fewer calls are made.
        prompts: ids, of any lengths, none empty.
        config: how; greedy by default. Filters and temperature act on both models.

    Raises:
        UnsupportedCall: a model that is not decoded token by token, vocabularies that differ, or a beam search.
        UnsupportedShape: no prompt, an empty one, or ids outside the vocabulary.
    """
    config, speculation = config or GenerationConfig(), speculation or SpeculationConfig()
    check_decoder(model, config)
    check_decoder(draft)
    if draft.vocab_size != model.vocab_size:
        raise UnsupportedCall(
            f"draft has a vocabulary of {draft.vocab_size} tokens, and the model {model.vocab_size}; train it with the "
            "model's tokenizer"
        )
    if config.num_beams > 1:
        raise UnsupportedCall(f"config.num_beams is {config.num_beams}; speculation does not search: num_beams=1")
    prompts = as_lists(prompts, model.vocab_size, empty=False)
    reasons: list[Reason] = []
    begin = time.perf_counter()
    with evaluating(model), evaluating(draft), torch.inference_mode():
        texts = [_Text(model, draft, prompt, config, i) for i, prompt in enumerate(prompts)]
        ready = time.perf_counter()
        for text in texts:
            while (reason := text.reason) is None:
                text.round(speculation)
            reasons.append(reason)
    generation = Generation(
        tokens=[t.written for t in texts],
        log_probs=[t.log_probs for t in texts],
        reasons=reasons,
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(len(t.written) for t in texts),
        prefill_seconds=ready - begin,
        decode_seconds=time.perf_counter() - ready,
    )
    return Speculation(
        generation=generation,
        proposed=sum(t.proposed for t in texts),
        accepted=sum(t.accepted for t in texts),
        calls=sum(t.target.calls for t in texts),
    )


class _Text:
    """One text that is being written."""

    def __init__(
        self, model: LanguageModel, draft: LanguageModel, prompt: list[int], config: GenerationConfig, sample_id: int
    ):
        self.config, self.prompt = config, prompt
        self.target, self.draft = _Reader(model, prompt, config), _Reader(draft, prompt, config)
        self.generator = generator(config.seed, sample_id)
        self.written: list[int] = []
        self.log_probs: list[float] = []
        self.reason: Reason | None = None
        self.proposed = self.accepted = 0

    def round(self, speculation: SpeculationConfig) -> None:
        """Propose, check, and take what is accepted and one token more."""
        proposals, guesses, draft_state = self._propose(speculation.num_assistant_tokens)
        target = self.target
        if len(target.unread) > speculation.again + 1:
            _, target.state = target.look(target.unread[:-1], target.state, 1)
            target.unread = target.unread[-1:]
        logits, state = target.look(target.unread + proposals, target.state, len(proposals) + 1)
        taken: list[int] = []
        for i, proposal in enumerate([*proposals, None]):
            wanted = self._distribution(logits[i : i + 1], [])
            token = self._take(proposal, wanted, None if proposal is None else guesses[i])
            taken.append(token)
            self.written.append(token)
            self.log_probs.append(float(logits[i, token] - logits[i].logsumexp(-1)))
            self.reason = finish_reason(self.written, self.config)
            if token != proposal or self.reason is not None:
                break
        self.proposed += len(proposals)
        self.accepted += sum(token == proposal for token, proposal in zip(taken, proposals, strict=False))
        if taken[:-1] == proposals:
            target.state, target.unread = state, taken[-1:]
            # The draft model has not read its last proposal yet.
            self.draft.state, self.draft.unread = draft_state, taken[-2:]
        else:
            target.unread = target.unread + taken
            self.draft.unread = taken

    def _propose(self, count: int) -> tuple[list[int], list[Tensor], State]:
        """Tokens of the draft model, the distributions that each was drawn from, and its state before the last."""
        # No more than may be written, the target's own token included.
        count = max(1, min(count, self.config.max_new_tokens - len(self.written) - 1))
        logits, state = self.draft.look(self.draft.unread, self.draft.state, 1)
        # What follows may be rejected.
        self.draft.state, self.draft.unread = state, []
        proposals: list[int] = []
        guesses: list[Tensor] = []
        while True:
            guesses.append(self._distribution(logits, proposals))
            proposals.append(self._draw(guesses[-1]))
            if len(proposals) == count:
                return proposals, guesses, state
            logits, state = self.draft.look(proposals[-1:], state, 1)

    def _distribution(self, logits: Float[Tensor, "1 v"], further: list[int]) -> Float[Tensor, "1 v"]:
        """How the next token is chosen after the text and `further`."""
        seen = None
        if self.config.repetition_penalty != 1:
            seen = seen_tokens([self.prompt + self.written + further], logits.shape[1], logits.device)
        return distribution(logits, self.config, seen)

    def _take(self, proposal: int | None, wanted: Float[Tensor, "1 v"], guess: Float[Tensor, "1 v"] | None) -> int:
        """The proposal with probability min(1, wanted / guess), or else a token from what `wanted` has more of."""
        if proposal is None or guess is None:
            return self._draw(wanted)
        if self._uniform() * float(guess[0, proposal]) < float(wanted[0, proposal]):
            return proposal
        more = (wanted - guess).clamp(min=0)
        # Rounding may leave nothing where the two are equal.
        return self._draw(more if more.any() else wanted)

    def _draw(self, probabilities: Float[Tensor, "1 v"]) -> int:
        return int(draw(probabilities, [self.generator]))

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))
