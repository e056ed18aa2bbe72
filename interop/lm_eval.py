"""Language models for EleutherAI's lm-eval, all request types, autoregressive and by diffusion.

Importing this module registers the model "omnimix" with lm-eval: `get_model("omnimix")`, or
`lm_eval.simple_evaluate(model="omnimix", model_args="run=runs/name", ...)`. `omnimix text eval` is the command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..backbones.config import positive
from ..backbones.decoding import DiffusionConfig, GenerationConfig, diffuse
from ..backbones.decoding.prefill import evaluating, last_logits
from ..backbones.language import LanguageModel
from ..backbones.layout import Layout
from ..errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..modalities.text.text_generator import TextGenerator
from ..modalities.text.tokenizer import Tokenizer, load_tokenizer
from ..utils.log import logger_of
from .importing import load_language_model, source_hidden, wanted
from .lm_eval_options import WritingOptions

wanted("lm_eval", "evaluation", "eval")
with source_hidden():
    # lm-eval looks for its own models only while it knows of none: they are registered before ours.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

__all__ = ["OmnimixLM"]

# Tokens in one forward pass; longer texts resume from their states.
TOKENS_AT_A_TIME = 16384
# Of these logits, and of their softmax, several copies are held.
LOGITS_AT_A_TIME = 1 << 24


# What lm-eval asks for where nobody names a device.
DEFAULT_DEVICE = "cuda:0"
logger = logger_of(__name__)


@register_model("omnimix")
class OmnimixLM(TemplateLM):
    """A run, or a model with its tokenizer, as lm-eval's model.

    Likelihoods of an autoregressive model are exact, and texts of any length are read piece by piece from the states.
    Those of a diffusion model are bounds: −log p is estimated from above, with `samples` seeded draws, and says so in
    the results (`get_model_info`); "is greedy" means that greedy unmasking, one token a step, writes the same.

    Args:
        run: folder of a run, or its name under `runs/`.
        model, tokenizer: in the place of a run; a tokenizer may also be a path.
        batch_size: requests at a time.
        device: where the model is put; where it is by default, and for lm-eval's own default, "cuda:0", where there is
            no such device.
        max_length: tokens that the model is given at most, the oldest left out; long documents are then scored in
            windows. None for all.
        max_gen_toks: tokens to write where a task does not say.
        samples, seed: of a diffusion likelihood, and the seed of what is drawn when writing.
        steps: of a diffusion model's writing; as many as tokens by default.
        prefix: whether contexts begin with the end token, as documents in training do.
        max_batch_size: lm-eval passes it to every model; it must not be below `batch_size`.

    Raises:
        ConfigError: not one of `run`, and `model` with `tokenizer`; a tokenizer of another model; or a number that is
            not positive.
        CheckpointError: the run holds no language model.
    """

    def __init__(
        self,
        run: str | None = None,
        *,
        model: LanguageModel | None = None,
        tokenizer: Tokenizer | str | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        samples: int = 32,
        seed: int = 0,
        steps: int | None = None,
        prefix: bool = True,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        found = None
        if run is not None and model is None:
            model, found = load_language_model(run)
        elif run is not None or model is None:
            raise ConfigError("run, model: pass one of them")
        if tokenizer is not None:
            found = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        if found is None:
            raise ConfigError("tokenizer: a model without a run needs one")
        if not str(batch_size).isdigit():
            raise ConfigError(f"batch_size is {batch_size!r}; it must be a number, as nothing is tried out")
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():
            # Every command of lm-eval that names no device passes it on.
            logger.warning("%s is not available; the model stays on %s", device, model.embedding.weight.device)
            device = None
        self.run, self.model, self.tokenizer = run, model if device is None else model.to(device), found
        self.writer = TextGenerator(self.model, found)
        self.batch_size = int(batch_size)
        self.max_length, self.max_gen_toks, self.steps = max_length, max_gen_toks, steps
        self.samples, self.seed, self.prefix = samples, seed, prefix
        positive(self, "batch_size", "max_length", "max_gen_toks", "samples", "steps")
        if max_batch_size is not None and max_batch_size < self.batch_size:
            raise ConfigError(f"max_batch_size is {max_batch_size}, and batch_size {batch_size}")
        self._device = model.embedding.weight.device
        self._errors: list[float] = []

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end

    @property
    def tokenizer_name(self) -> str:
        """Differs where text is encoded otherwise: lm-eval's caches go by it."""
        return f"omnimix-{self.tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, where one is to be applied. A tokenizer has one at most, so a name chooses nothing."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ConfigError(f"chat_template is {chat_template!r}; a tokenizer has one template, without a name")
        return self.tokenizer.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.chat(chat_history, generate=add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results with the numbers: how the likelihoods were found."""
        info: dict[str, Any] = {
            "run": self.run,
            "objective": self.model.config.objective_name,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.embedding.weight.dtype),
            "likelihood": "exact",
        }
        # Of blocks of one token the likelihood is exact.
        if self.writer.diffusion and self.model.objective.block != 1:
            info |= {
                "likelihood": f"bound from {self.samples} draws, seed {self.seed}",
                "likelihood_samples": self.samples,
                "likelihood_seed": self.seed,
            }
            if self._errors:
                info["likelihood_standard_error"] = sum(self._errors) / len(self._errors)
        return info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; names of special tokens mean these tokens, as templates and few-shot prompts hold them."""
        ids = self.tokenizer.encode(string, special=True)
        begin = self.prefix and add_special_tokens is not False and ids[:1] != [self.tokenizer.end]
        return [self.tokenizer.end, *ids] if begin else ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows, given = [], []
        for text, context, continuation in requests:
            if not context or not continuation:
                raise UnsupportedShape(f"request {text!r}: context and continuation need at least one token each")
            row = context + continuation
            # The last token is predicted and not read.
            row = row if self.max_length is None else row[-self.max_length - 1 :]
            if len(row) <= len(continuation):
                raise UnsupportedShape(
                    f"request {text!r}: max_length is {self.max_length}, and the continuation alone has "
                    f"{len(continuation)} tokens"
                )
            rows.append(row)
            given.append(len(row) - len(continuation))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in self._batches([len(row) for row in rows], "Likelihoods", disable_tqdm):
            score = self._bound if self.writer.diffusion else self._exact
            nats, greedy = score([rows[i] for i in part], [given[i] for i in part])
            for i, cost, best in zip(part, nats.tolist(), greedy.tolist(), strict=True):
                answers[i] = (-cost, best)
                if (text := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answers[i])
        return answers

    def _batches(self, sizes: Sequence[int], what: str, quiet: bool) -> Iterator[list[int]]:
        """Places of requests, some at a time, the longest first, so that what does not fit fails at once."""
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        with tqdm(total=len(order), desc=what, disable=quiet) as bar:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                yield part
                bar.update(len(part))

    def _exact(self, rows: list[list[int]], given: list[int]) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """−log p of each row's tokens after the first `given`, and whether each is the most probable one."""
        device = self.model.embedding.weight.device
        nats = torch.zeros(len(rows), dtype=torch.float64, device=device)
        wrong = torch.zeros(len(rows), dtype=torch.int64, device=device)
        alive, place, state = list(range(len(rows))), 0, None
        chunk = max(1, TOKENS_AT_A_TIME // len(rows))
        with evaluating(self.model), torch.inference_mode():
            while alive:
                # One more than is read: the last token is a target only.
                pieces = [rows[i][place : place + chunk + 1] for i in alive]
                borders = torch.tensor([0, *accumulate(len(p) - 1 for p in pieces)], device=device)
                tokens = torch.tensor([[t for p in pieces for t in p[:-1]]], device=device)
                out = self.model.hidden(tokens, Layout(causal=True, cu_seqlens=borders), state)
                scored = [
                    (at, piece[j + 1], i)
                    for i, piece, first in zip(alive, pieces, borders.tolist(), strict=False)
                    for j, at in enumerate(range(first, first + len(piece) - 1))
                    if place + j + 1 >= given[i]
                ]
                if scored:
                    self._score(out.y[0], torch.tensor(scored, device=device), nats, wrong)
                left = [j for j, i in enumerate(alive) if len(rows[i]) > place + chunk + 1]
                state = out.state
                if state is not None and left and len(left) < len(alive):
                    state = state.select(torch.tensor(left, device=device))
                alive, place = [alive[j] for j in left], place + chunk
        return nats.cpu(), (wrong == 0).cpu()

    def _score(self, y: Tensor, scored: Tensor, nats: Tensor, wrong: Tensor) -> None:
        """Add up the costs of `scored`: (place in y, target, row) each."""
        for places, targets, rows in (
            part.unbind(1) for part in scored.split(max(1, LOGITS_AT_A_TIME // self.model.vocab_size))
        ):
            logits = last_logits(self.model, y[places])
            cost = logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
            nats.index_add_(0, rows, cost.double())
            wrong.index_add_(0, rows, (logits.argmax(-1) != targets).long())

    def _bound(self, rows: list[list[int]], given: list[int]) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """An estimated bound on −log p, and whether greedy unmasking writes the row."""
        device = self.model.embedding.weight.device
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        counted = torch.arange(tokens.shape[1]) >= torch.tensor(given)[:, None]
        with evaluating(self.model), torch.inference_mode():
            found = self.model.objective.log_likelihood(
                self.model,
                tokens.to(device),
                lengths=lengths.to(device),
                counted=counted.to(device),
                samples=self.samples,
                seed=self.seed,
            )
        if found.error is not None:
            self._errors += found.error.tolist()
        greedy = [self._unmasks(row[:n], row[n:]) for row, n in zip(rows, given, strict=True)]
        return found.nats, torch.tensor(greedy)

    def _unmasks(self, context: list[int], continuation: list[int]) -> bool:
        mask = self.model.mask_token

        def compare(sequences: list[list[int]]) -> None:
            written = sequences[0][len(context) :]
            if any(a not in (mask, b) for a, b in zip(written, continuation, strict=True)):
                raise _Differs

        try:
            diffuse(self.model, [context], DiffusionConfig(max_new_tokens=len(continuation)), watch=compare)
        except _Differs:
            return False
        return True

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole documents after the end token; in windows where `max_length` is set."""
        pieces: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0], special=True)
            limit = max(1, len(ids)) if self.max_length is None else self.max_length
            for window in get_rolling_token_windows(ids, self.prefix_token_id, limit, context_len=1):
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the strings `until`, the end token, or as many tokens as the task wants.

        A request draws by its place among all and the seed, whatever it is batched with.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.arguments[1].items(), key=str)), []).append(i)
        texts = [""] * len(requests)
        for group in groups.values():
            options = WritingOptions(requests[group[0]].arguments[1], self.max_gen_toks, self.tokenizer)
            prompts = self._prompts([requests[i].args[0] for i in group], options.most)
            for part in self._batches([len(p) for p in prompts], "Texts", disable_tqdm):
                found = self._write([prompts[j] for j in part], [group[j] for j in part], options)
                for j, text in zip(part, found, strict=True):
                    texts[group[j]] = text
                    self.cache_hook.add_partial("generate_until", requests[group[j]].args, texts[group[j]])
        return texts

    def _prompts(self, contexts: list[str], most: int) -> list[list[int]]:
        prompts = [self.tok_encode(context) or [self.tokenizer.end] for context in contexts]
        if self.max_length is None:
            return prompts
        if most >= self.max_length:
            raise UnsupportedShape(
                f"max_length is {self.max_length}; {most} tokens are to be generated, which leaves none for the prompt"
            )
        return [prompt[most - self.max_length :] for prompt in prompts]

    def _write(self, prompts: list[list[int]], numbers: list[int], options: WritingOptions) -> list[str]:
        if self.writer.diffusion:
            refused = sorted(options.others.keys() - {"top_p"})
            if refused:
                raise UnsupportedCall(
                    f"{', '.join(refused)}: diffusion models generate with temperature and top_p only"
                )
            config = DiffusionConfig(
                max_new_tokens=options.most,
                steps=self.steps,
                temperature=options.temperature,
                seed=self.seed,
                **options.others,
            )
        else:
            config = GenerationConfig(
                max_new_tokens=options.most,
                temperature=options.temperature,
                stop=[[token] for token in options.stop],
                seed=self.seed,
                chunk=max(1, TOKENS_AT_A_TIME // len(prompts)),
                **options.others,
            )
        found = self.writer.generate(prompts, config, stop=options.until, sample_ids=numbers)
        return [options.cut(result.text, result.tokens) for result in found]


class _Differs(Exception):
    """Greedy unmasking has written another token."""
