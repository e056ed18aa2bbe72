"""Autoregressive generation: prompts are prefilled together, then all sequences continue as one batch of steps."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedCall, UnsupportedShape
from ...utils.renamed import renamed_arguments
from ..language import LanguageModel
from ..state import State
from .config import GenerationConfig, decoding
from .prefill import advance, as_lists, check_decoder, evaluating, read
from .prefix import Prefix
from .sampling import Sampler

Reason = Literal["end", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token of a stream.

    Args:
        token: its id.
        log_prob: log p(token | tokens before it) as the model has it, before any filter or temperature.
        reason: why the text is finished with this token, or None where it continues.
    """

    token: int
    log_prob: float
    reason: Reason | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was written.

    Args:
        tokens: one list a prompt, without the prompt; the end token and stop sequences are among them.
        log_probs: of each token, before any filter or temperature.
        reasons: why each text is finished: "end" (the end token), "stop" (a stop sequence) or "length"
            (max_new_tokens).
        scores: of a beam search: each text's log-probability over its length ** length_penalty.
        prompt_tokens, new_tokens: how many were read and written.
        prefill_seconds: until the first tokens were known.
        decode_seconds: for all others.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    reasons: list[Reason]
    scores: list[float] | None = None
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


def finish_reason(written: Sequence[int], config: GenerationConfig) -> Reason | None:
    """Why a text that ends in the last of `written` is finished, or None."""
    if written[-1] == config.end:
        return "end"
    for stop in config.stop:
        if tuple(written[-len(stop) :]) == stop:
            return "stop"
    return "length" if len(written) >= config.max_new_tokens else None


def start(
    model: LanguageModel, prompts: list[list[int]], chunk: int | None, prefix: Prefix | None
) -> tuple[Float[Tensor, "n v"], State]:
    """Logits after each prompt and the states, all after `prefix` where there is one."""
    if prefix is None:
        return read(model, prompts, chunk)
    device = model.embedding.weight.device
    full = [i for i, prompt in enumerate(prompts) if prompt]
    logits, state = prefix.logits, prefix.state
    if full:
        copies = state.select(torch.zeros(len(full), dtype=torch.int64, device=device))
        after, copies = read(model, [prompts[i] for i in full], chunk, copies)
        if len(full) == len(prompts):
            return after, copies
        logits = torch.cat([logits, after])
        state = State.join([state, copies])
    # Row 0 is the prefix itself, for prompts that add nothing to it.
    places = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    places[full] = torch.arange(1, len(full) + 1, device=device)
    return logits[places], state.select(places)


class Writer:
    """Sequences being written; finished ones leave the batch, so that a long one does not pay for them.

    Every call of `next` gives one token to each sequence that is not finished. It and the constructor, which reads the
    prompts, are to be called in inference mode with the model in evaluation mode. For arguments and errors see
    `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]] | Int[Tensor, "n t"],
        config: GenerationConfig,
        prefix: Prefix | None = None,
        sample_ids: Sequence[int] | None = None,
    ):
        check_decoder(model, config)
        prompts = as_lists(prompts, model.vocab_size, empty=prefix is not None)
        sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        if len(sample_ids) != len(prompts):
            raise UnsupportedShape(f"sample_ids: {len(sample_ids)} for {len(prompts)} prompts; pass one each")
        self.model, self.config = model, config
        self.rows = list(range(len(prompts)))
        self.written: list[list[int]] = [[] for _ in prompts]
        self.logits, self.state = start(model, prompts, config.chunk, prefix)
        before = [] if prefix is None else prefix.tokens
        whole = [before + prompt for prompt in prompts]
        self.sampler = Sampler(config, whole, sample_ids, model.vocab_size, self.logits.device)
        self.pending: Tensor | None = None

    def next(self) -> list[tuple[int, Step]]:
        """The number of each sequence that was not finished, and its next token."""
        if self.pending is not None:
            self.logits, self.state = advance(self.model, self.pending, self.state)
        tokens, log_probs = self.sampler.choose(self.logits)
        steps, left = [], []
        for i, (row, token, log_prob) in enumerate(zip(self.rows, tokens.tolist(), log_probs.tolist(), strict=True)):
            self.written[row].append(token)
            reason = finish_reason(self.written[row], self.config)
            steps.append((row, Step(token=token, log_prob=log_prob, reason=reason)))
            if reason is None:
                left.append(i)
        if len(left) < len(self.rows):
            self._keep(left)
            tokens = tokens[left]
        self.pending = tokens
        return steps

    def leave(self, rows: Container[int]) -> None:
        """Continue without these sequences, which are finished for a reason that tokens do not show (stop strings)."""
        left = [i for i, row in enumerate(self.rows) if row not in rows]
        if len(left) < len(self.rows):
            if self.pending is None:
                self.logits = self.logits[left]
            else:
                self.pending = self.pending[left]
            self._keep(left)

    def _keep(self, left: list[int]) -> None:
        self.rows = [self.rows[i] for i in left]
        if left:
            self.state = self.state.select(torch.tensor(left, device=self.logits.device))
            self.sampler.select(left)


@renamed_arguments(numbers="sample_ids")
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "n t"],
    config: GenerationConfig | Mapping[str, Any] | None = None,
    *,
    prefix: Prefix | None = None,
    sample_ids: Sequence[int] | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt; each text is generated as it would be alone.

    Args:
        prompts: ids, of any lengths; an empty one only after a prefix.
        config: how, or its fields as a mapping; greedy by default.
        prefix: the state after what all prompts follow (`read_prefix`).
        sample_ids: by which, with the seed, each prompt draws; its place by default. So a prompt is written the same in
            any batch where its id is the same.
        options: fields of `GenerationConfig`, in place of those of `config`.

    Raises:
        ConfigError: no such option.
        UnsupportedCall: the model is not decoded token by token, with the remedy.
        UnsupportedShape: no prompt, an empty one, or ids outside the vocabulary.
    """
    config = decoding(GenerationConfig, config, options)
    check_decoder(model, config)
    prompts = as_lists(prompts, model.vocab_size, empty=prefix is not None)
    if config.num_beams > 1:
        from .beam import search

        return search(model, prompts, config, prefix)
    log_probs: list[list[float]] = [[] for _ in prompts]
    reasons: dict[int, Reason] = {}
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        writer = Writer(model, prompts, config, prefix, sample_ids)
        first = 0.0
        while writer.rows:
            for row, step in writer.next():
                log_probs[row].append(step.log_prob)
                if step.reason is not None:
                    reasons[row] = step.reason
            first = first or time.perf_counter()
    return Generation(
        tokens=writer.written,
        log_probs=log_probs,
        reasons=[reasons[i] for i in range(len(prompts))],
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(map(len, writer.written)),
        prefill_seconds=first - begin,
        decode_seconds=time.perf_counter() - first,
    )


@renamed_arguments(number="sample_id")
def stream(
    model: LanguageModel,
    prompt: Sequence[int] | Int[Tensor, " t"],
    config: GenerationConfig | Mapping[str, Any] | None = None,
    *,
    prefix: Prefix | None = None,
    sample_id: int = 0,
    **options: Any,
) -> Iterator[Step]:
    """The tokens that `generate` generates after one prompt, each as soon as it is known.

    Whoever stops listening, by an interrupt or otherwise, keeps what was written until then. For arguments and errors
    see `generate`; they are raised before the first token is asked for.
    """
    config = decoding(GenerationConfig, config, options)
    check_decoder(model, config)
    if config.num_beams > 1:
        raise UnsupportedCall(
            f"config.num_beams is {config.num_beams}; a beam search knows no token before the last: num_beams=1"
        )
    prompts = as_lists([list(map(int, prompt))], model.vocab_size, empty=prefix is not None)
    return _stream(model, prompts, config, prefix, sample_id)


def _stream(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, prefix: Prefix | None, sample_id: int
) -> Iterator[Step]:
    # Neither evaluation nor inference mode may be left on while the caller has control.
    with evaluating(model), torch.inference_mode():
        writer = Writer(model, prompts, config, prefix, [sample_id])
    while writer.rows:
        with evaluating(model), torch.inference_mode():
            ((_, step),) = writer.next()
        yield step
