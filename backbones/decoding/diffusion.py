"""Generation by diffusion: hidden tokens are revealed over some steps, all at once or block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import log
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedCall, UnsupportedShape
from ...utils.renamed import renamed_arguments, renamed_options
from ..config import bounded, not_negative, positive, proportion
from ..language import LanguageModel
from ..layout import Layout
from ..state import State
from ..typed import Config
from .config import decoding
from .generate import Generation
from .prefill import as_lists, evaluating, last_logits
from .sampling import draw, generator, keep_top_p

Watch = Callable[[list[list[int]]], None]


@renamed_options(length="max_new_tokens")
@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """Options of `diffuse`.

    Args:
        max_new_tokens: tokens that are generated after each prompt; 0 only fills in the prompt's own mask tokens.
        steps: denoising steps for each sequence, distributed evenly over its blocks, at least one each; by
            default as many as there are hidden tokens.
        block: tokens that are written at a time. Under objective "masked" (and "sedd") blocks are counted from the
            prompt's end, None for all at once (semi-autoregressive, arXiv 2502.09992). Under objective "block" they are
            counted from the sequence's beginning, None for the size that the model was trained with.
        remask: which tokens a step reveals; all others stay hidden. "low_confidence": the most probable ones, as many
            as the steps that are left require. "random": as many, drawn at random. "threshold": all with at least
            the probability `threshold`, at least as many as "low_confidence". "ancestral": each at random, so that
            sequences are distributed as the diffusion process says (MDLM, arXiv 2406.07524; for "sedd" its analytic
            steps, arXiv 2310.16834).
        threshold: for `remask="threshold"`.
        temperature: divides the logits before tokens are drawn; at 0 the most probable ones are taken.
        top_p: draw among the fewest most probable tokens that have this probability together.
        end: the id after which a text is finished. Blocks after one that holds it are not written.
        seed: of the draws; each sequence has a generator of its own, seeded by this and its `sample_id`.
        cache: whether what lies before a block is read once and kept as a state, or read again in each step. By
            default, where it is exact.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    block: int | None = None
    remask: Literal["low_confidence", "random", "threshold", "ancestral"] = "low_confidence"
    threshold: float = 0.9
    temperature: float = 0.0
    top_p: float | None = None
    end: int | None = None
    seed: int = 0
    cache: bool | None = None

    def __post_init__(self) -> None:
        positive(self, "steps", "block")
        not_negative(self, "max_new_tokens")
        proportion(self, "threshold", "top_p")
        bounded(self, "temperature", least=0, wanted="at least 0 (greedy) and finite")
        bounded(self, "end", "seed")


@dataclass(frozen=True, kw_only=True)
class Diffusion(Generation):
    """What was written; `log_probs` are those with which the tokens were revealed, before temperature and top-p.

    Args:
        sequences: prompts, their mask tokens filled in, and what was generated after them.
        steps: in how many steps each.
    """

    sequences: list[list[int]]
    steps: list[int]


class _Canvas:
    """One sequence while it is being written."""

    def __init__(self, prompt: list[int], sample_id: int, mask: int, block: int | None, config: DiffusionConfig):
        self.config, self.mask = config, mask
        self.tokens = torch.tensor(prompt + [mask] * config.max_new_tokens, dtype=torch.int64)
        self.log_probs = torch.zeros(len(self.tokens), dtype=torch.float64)
        self.prompt, self.steps, self.number = len(prompt), 0, 0
        self.generator = generator(config.seed, sample_id)
        if block is not None:
            bounds = [*range(0, len(self.tokens), block), len(self.tokens)]
        else:
            bounds = [
                0,
                *range(self.prompt, len(self.tokens), config.block or max(1, config.max_new_tokens)),
                len(self.tokens),
            ]
            # What is hidden inside the prompt is filled in together with the first block.
            del bounds[1 : 2 if config.max_new_tokens else 1]
        self.spans = [(a, b) for a, b in pairwise(bounds) if (self.tokens[a:b] == mask).any()]
        # The tokens that a state has read, and, where there are any, the backbone's output at the last of them.
        self.read = 0
        self.last: Tensor
        if self.spans:
            self._enter()

    def _enter(self) -> None:
        steps, n = self.config.steps, len(self.spans)
        self.start, self.stop = self.spans[self.number]
        if steps is None:
            self.left = len(self.hidden())
        else:
            self.left = max(1, steps * (self.number + 1) // n - steps * self.number // n)

    def hidden(self) -> Int[Tensor, " m"]:
        """Places of the block's tokens that are not yet known."""
        return self.start + (self.tokens[self.start : self.stop] == self.mask).nonzero()[:, 0]

    def next(self) -> bool:
        """Go to the next block; False where there is none, or the text has ended."""
        self.number += 1
        if self.number == len(self.spans) or self.config.end in self.tokens[self.prompt : self.stop].tolist():
            return False
        self._enter()
        return True

    def reveal(self, logits: Float[Tensor, "m v"], haste: Float[Tensor, " m"]) -> None:
        """Make some hidden tokens known, at least so many that the steps that are left suffice for all."""
        config, hidden = self.config, self.hidden()
        choice, log_probs = self._choose(logits)
        least = -(-len(hidden) // self.left)
        if config.remask == "ancestral":
            chance = torch.rand(len(hidden), generator=self.generator, dtype=torch.float64)
            known = chance < haste.double().cpu() / self.left if self.left > 1 else torch.ones_like(chance) > 0
        else:
            random = config.remask == "random"
            rank = torch.rand(len(hidden), generator=self.generator) if random else log_probs
            known = torch.zeros(len(hidden), dtype=torch.bool)
            known[rank.sort(descending=True, stable=True).indices[:least]] = True
            if config.remask == "threshold":
                known |= log_probs >= log(config.threshold)
        self.tokens[hidden[known]] = choice[known]
        self.log_probs[hidden[known]] = log_probs[known]
        self.left = max(1, self.left - 1)
        self.steps += 1

    def _choose(self, logits: Float[Tensor, "m v"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        config = self.config
        if config.temperature:
            flat = logits / config.temperature
            flat = flat if config.top_p is None else keep_top_p(flat, config.top_p)
            choice = draw(flat.softmax(-1, dtype=torch.float64), [self.generator] * len(flat))
        else:
            choice = logits.argmax(-1)
        log_probs = logits.gather(1, choice[:, None])[:, 0] - logits.logsumexp(-1)
        return choice.cpu(), log_probs.double().cpu()

    def written(self) -> tuple[list[int], bool]:
        """What follows the prompt, up to the end token, and whether there is one."""
        tokens = self.tokens[self.prompt :].tolist()
        ended = self.config.end is not None and self.config.end in tokens
        return tokens[: tokens.index(self.config.end) + 1] if ended else tokens, ended


class _Filler:
    """Fills canvases, each at its own block, in common denoising steps."""

    def __init__(
        self, model: LanguageModel, canvases: list[_Canvas], block: int | None, cache: bool, watch: Watch | None
    ):
        self.model, self.canvases, self.block, self.cache, self.watch = model, canvases, block, cache, watch
        self.device = model.embedding.weight.device
        self.state: State | None = None
        # When the first tokens were known.
        self.first: float | None = None

    def run(self) -> None:
        active = [c for c in self.canvases if c.spans]
        while active:
            if self.cache:
                self._read(active)
            self._fill(active)
            left = [i for i, c in enumerate(active) if c.next()]
            if left and len(left) < len(active):
                self.state = self._states(left)
            active = [active[i] for i in left]

    def _states(self, rows: list[int]) -> State | None:
        if self.state is None:
            return None
        return self.state.select(torch.tensor(rows, device=self.device))

    def _read(self, active: list[_Canvas]) -> None:
        """Advance each state to the start of its canvas's block."""
        rows = [i for i, c in enumerate(active) if c.read < c.start]
        rest = [i for i in range(len(active)) if i not in set(rows)]
        if not rows:
            return
        if rest and self.state is None:
            self.state = self.model.init_state(len(active), device=self.device, dtype=self.model.embedding.weight.dtype)
        pieces = [active[i].tokens[active[i].read : active[i].start] for i in rows]
        outputs, state = self._pass(pieces, self._states(rows) if rest else self.state)
        for i, y in zip(rows, outputs, strict=True):
            active[i].read, active[i].last = active[i].start, y[-1:]
        if rest:
            # What is cached has states.
            both = State.join([state, self._states(rest)])  # pyright: ignore[reportArgumentType]
            order = torch.tensor(rows + rest, device=self.device).argsort()
            state = both.select(order)
        self.state = state

    def _fill(self, active: list[_Canvas]) -> None:
        rows = list(range(len(active)))
        while rows:
            working = [active[i] for i in rows]
            y = torch.cat(self._outputs(working, rows if len(rows) < len(active) else None))
            logits = last_logits(self.model, y)
            haste = self.model.objective.haste(logits)
            sizes = [len(c.hidden()) for c in working]
            for canvas, own, speed in zip(working, logits.split(sizes), haste.split(sizes), strict=True):
                canvas.reveal(own, speed)
            self.first = self.first or time.perf_counter()
            if self.watch is not None:
                self.watch([c.tokens.tolist() for c in self.canvases])
            rows = [i for i in rows if len(active[i].hidden())]

    def _outputs(self, working: list[_Canvas], rows: list[int] | None) -> list[Float[Tensor, "_ d"]]:
        """The backbone's outputs where each canvas's hidden tokens are predicted."""
        shift = int(self.model.objective.shift)
        firsts = [c.start if self.cache else 0 for c in working]
        if self.cache and shift and all(c.stop == c.start + 1 for c in working):
            # All is predicted from what the states have read.
            return [c.last for c in working]
        stops = [len(c.tokens) if self.block is None else c.stop for c in working]
        pieces = [c.tokens[a:b] for c, a, b in zip(working, firsts, stops, strict=True)]
        outputs, _ = self._pass(pieces, self.state if rows is None else self._states(rows))
        found = []
        for canvas, y, first in zip(working, outputs, firsts, strict=True):
            if shift and canvas.read:
                y, first = torch.cat([canvas.last, y]), first - 1
            found.append(y[(canvas.hidden() - first - shift).to(self.device)])
        return found

    def _pass(
        self, pieces: list[Int[Tensor, " _"]], state: State | None
    ) -> tuple[Sequence[Float[Tensor, "_ d"]], State | None]:
        lengths = [len(piece) for piece in pieces]
        ragged = len(set(lengths)) > 1
        tokens = (torch.cat(pieces)[None] if ragged else torch.stack(pieces)).to(self.device)
        bounds = torch.tensor([0, *accumulate(lengths)], device=self.device) if ragged else None
        layout = Layout(causal=False if self.block is None else "block", block=self.block, cu_seqlens=bounds)
        out = self.model.hidden(tokens, layout, state)
        return out.y[0].split(lengths) if ragged else list(out.y), out.state


@renamed_arguments(numbers="sample_ids")
def diffuse(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "n t"],
    config: DiffusionConfig | Mapping[str, Any] | None = None,
    *,
    sample_ids: Sequence[int] | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> Diffusion:
    """Continue each prompt, and fill in its mask tokens; all its other tokens stay. Each as it would be alone.

    Args:
        prompts: ids, of any lengths; `model.mask_token` among them stands for tokens to be filled in.
        config: how, or its fields as a mapping; greedy by default, a token a step.
        sample_ids: by which, with the seed, each prompt draws; its place by default.
        watch: called after every step with all sequences, where hidden tokens are `model.mask_token`.
        options: fields of `DiffusionConfig`, in place of those of `config`.

    Raises:
        ConfigError: no such option.
        UnsupportedCall: the model is not decoded by diffusion, or the cache would not be exact, with the remedy.
        UnsupportedShape: no prompt, ids outside the vocabulary, or nothing before the first hidden token of a model
            that predicts each token at the place before it.
    """
    config = decoding(DiffusionConfig, config, options)
    name = model.config.objective_name
    if model.objective.decoder != "diffusion":
        raise UnsupportedCall(
            f"objective {name!r} is autoregressive; call generate, or make a diffusion model of it with omnimix.convert"
        )
    block = model.objective.block
    if block is None and config.cache:
        raise UnsupportedCall(
            f"cache=True: under objective {name!r} every token sees those that are still hidden, so what is kept would "
            "be wrong as soon as one is revealed; leave cache out, or train with objective='block'"
        )
    rows = as_lists(prompts, model.vocab_size + 1, empty=True)
    sample_ids = list(range(len(rows))) if sample_ids is None else list(sample_ids)
    if len(sample_ids) != len(rows):
        raise UnsupportedShape(f"sample_ids: {len(sample_ids)} for {len(rows)} prompts; pass one each")
    for i, row in enumerate(rows):
        if model.objective.shift and (not row or row[0] == model.mask_token):
            raise UnsupportedShape(
                f"prompts: number {i} begins with nothing known, and each token is predicted at the place before it; "
                "begin with the tokenizer's end token"
            )
    block = block if block is None else config.block or block
    canvases = [_Canvas(row, n, model.mask_token, block, config) for row, n in zip(rows, sample_ids, strict=True)]
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        filler = _Filler(model, canvases, block, block is not None and config.cache is not False, watch)
        filler.run()
    first = filler.first or begin
    return _result(canvases, first - begin, time.perf_counter() - first)


def _result(canvases: list[_Canvas], prefill_seconds: float, decode_seconds: float) -> Diffusion:
    written = [c.written() for c in canvases]
    tokens = [ids for ids, _ in written]
    return Diffusion(
        tokens=tokens,
        log_probs=[
            c.log_probs[c.prompt : c.prompt + len(ids)].tolist() for c, ids in zip(canvases, tokens, strict=True)
        ],
        reasons=["end" if ended else "length" for _, ended in written],
        prompt_tokens=sum(c.prompt for c in canvases),
        new_tokens=sum(map(len, tokens)),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        sequences=[c.tokens[: c.prompt].tolist() + ids for c, ids in zip(canvases, tokens, strict=True)],
        steps=[c.steps for c in canvases],
    )
