"""Text in, text out, with any language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import LanguageModel, Layout
from ...backbones.decoding import DiffusionConfig, GenerationConfig, Prefix, diffuse, generate, read_prefix, stream
from ...backbones.decoding.diffusion import Watch
from ...backbones.decoding.generate import Reason, Writer
from ...backbones.decoding.prefill import evaluating
from ...errors import CheckpointError, ConfigError, UnsupportedCall
from ...utils.devices import usable_device
from ...utils.renamed import renamed_arguments
from ..common.classifier import check_known
from ..models import load_model, save_model
from .chat import Message
from .tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[Message] | Sequence[int]
Config = GenerationConfig | DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """The text generated after one prompt.

    Args:
        text: up to the end token or stop string, which it does not hold.
        tokens: as the model wrote them, those of the stop string or the end token included.
        log_probs: of each token; see `Generation` and `Diffusion`.
        reason: why it is finished: "end", "stop" or "length".
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    reason: Reason


class StopStrings:
    """Lets text through that cannot belong to a stop string, and the rest once that is sure.

    Args:
        stop: the strings, none empty.
    """

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop is {stop!r}; it must be a list of strings of at least one character each")
        self.stop = tuple(stop)
        self.held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What of the text so far is sure to stand before any stop string; sets `hit` where there is one."""
        text, self.held = self.held + text, ""
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.hit = True
            return text[: min(found)]
        longest = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def flush(self) -> str:
        """What is left where nothing follows."""
        text, self.held = self.held, ""
        return text


class _Text:
    """Text made of tokens one by one, as far as it is sure."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.stream, self.strings, self.end = tokenizer.stream(), StopStrings(stop), tokenizer.end

    def push(self, token: int, last: bool) -> str:
        """The text that this token makes sure; all of it where it is the last."""
        text = self.strings.push("" if last and token == self.end else self.stream.push(token))
        if last and not self.strings.hit:
            text += self.strings.push(self.stream.flush())
            text += "" if self.strings.hit else self.strings.flush()
        return text


class TextGenerator:
    """Writes with a language model, token by token or by diffusion, whatever it was trained for.

    Example:
        >>> writer = TextGenerator.load("runs/text/model")
        >>> for piece in writer.stream("def main(", GenerationConfig(temperature=0.8, top_p=0.95)):
        ...     print(piece, end="", flush=True)

    Args:
        model: any `LanguageModel`.
        tokenizer: that it was trained with.

    Raises:
        ConfigError: the tokenizer has tokens that the model does not know, or under diffusion lacks some that it does.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        more = tokenizer.vocab_size - model.vocab_size
        self.diffusion = model.objective.decoder == "diffusion"
        if more > 0 or (self.diffusion and more):
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size}; take the tokenizer "
                "that the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> TextGenerator:
        """The language model and tokenizer that a fit has saved in one folder.

        Raises:
            CheckpointError: a file is missing or corrupt, or the model is none of language.
        """
        model = load_model(folder)
        if not isinstance(model, LanguageModel):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, which writes no text; nothing was loaded")
        return cls(model.to(device), load_tokenizer(folder))

    def read(self, text: str, *, chunk: int | None = None) -> Prefix:
        """Read the beginning of many prompts once; see `read_prefix`."""
        return read_prefix(self.model, self._ids(text, None), chunk=chunk)

    @renamed_arguments(number="sample_id")
    def stream(
        self,
        prompt: Prompt,
        config: Config | None = None,
        *,
        stop: Sequence[str] = (),
        prefix: Prefix | None = None,
        sample_id: int = 0,
    ) -> Iterator[str]:
        """The text that `generate` generates after one prompt, in pieces as soon as they are final.

        No piece ends inside a character, and none holds a part of a stop string. What diffusion or a
        beam search writes comes at once.
        """
        config = self._config(config)
        if isinstance(config, DiffusionConfig) or config.num_beams > 1:
            return iter([self.generate([prompt], config, stop=stop, prefix=prefix, sample_ids=[sample_id])[0].text])
        text = _Text(self.tokenizer, stop)
        return self._pieces(
            stream(self.model, self._ids(prompt, prefix), config, prefix=prefix, sample_id=sample_id), text
        )

    @staticmethod
    def _pieces(steps: Any, text: _Text) -> Iterator[str]:
        try:
            for step in steps:
                piece = text.push(step.token, step.reason is not None)
                if piece:
                    yield piece
                if text.strings.hit:
                    return
        finally:
            # The model goes back to its mode at once, and not when the memory is cleared.
            steps.close()

    @renamed_arguments(numbers="sample_ids")
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        config: Config | None = None,
        *,
        stop: Sequence[str] = (),
        prefix: Prefix | None = None,
        sample_ids: Sequence[int] | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> list[TextResult]:
        """Continue each prompt, as it would be alone.

        Args:
            prompts: one text; or several, conversations as lists of messages with "role" and "content"; or ids, taken
                as they are.
            config: a `GenerationConfig`, or a `DiffusionConfig` for models that are decoded by diffusion; their
                defaults otherwise. Without an `end` it is the tokenizer's.
            stop: strings before which a text ends, wherever the boundaries of the tokens are. Under diffusion and in a
                beam search they are looked for afterwards.
            prefix: the state after what all prompts follow (`read`).
            sample_ids: by which, with the seed, each prompt draws; its place by default.
            watch: under diffusion called after every step; see `diffuse`.
            options: fields of the config: `max_new_tokens=20, temperature=0.8`.

        Raises:
            ConfigError: a config for the other kind of decoding, no such option, or an empty stop string.
            UnsupportedCall: a prefix under diffusion.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        config, ids = self._config(config, options), [self._ids(prompt, prefix) for prompt in prompts]
        texts = [_Text(self.tokenizer, stop) for _ in prompts]
        if isinstance(config, GenerationConfig) and config.num_beams == 1:
            return self._write(ids, config, texts, prefix, sample_ids)
        if isinstance(config, GenerationConfig):
            found = generate(self.model, ids, config, prefix=prefix)
        elif prefix is not None:
            raise UnsupportedCall("prefix: diffusion does not continue from a state; put its text into the prompts")
        else:
            found = diffuse(self.model, ids, config, sample_ids=sample_ids, watch=watch)
        results = []
        for tokens, log_probs, reason, text in zip(found.tokens, found.log_probs, found.reasons, texts, strict=True):
            pieces = []
            for i, token in enumerate(tokens):
                if not text.strings.hit:
                    pieces.append(text.push(token, i == len(tokens) - 1))
            reason = "stop" if text.strings.hit else reason
            results.append(TextResult(text="".join(pieces), tokens=tokens, log_probs=log_probs, reason=reason))
        return results

    def _write(
        self,
        ids: list[list[int]],
        config: GenerationConfig,
        texts: list[_Text],
        prefix: Prefix | None,
        sample_ids: Sequence[int] | None,
    ) -> list[TextResult]:
        pieces, log_probs = [""] * len(ids), [[] for _ in ids]
        reasons: list[Reason] = ["length"] * len(ids)
        with evaluating(self.model), torch.inference_mode():
            writer = Writer(self.model, ids, config, prefix, sample_ids)
            while writer.rows:
                stopped = set()
                for row, step in writer.next():
                    log_probs[row].append(step.log_prob)
                    pieces[row] += texts[row].push(step.token, step.reason is not None)
                    if texts[row].strings.hit:
                        stopped.add(row)
                    reasons[row] = "stop" if row in stopped else step.reason or "length"
                writer.leave(stopped)
        return [
            TextResult(text=text, tokens=tokens, log_probs=own, reason=reason)
            for text, tokens, own, reason in zip(pieces, writer.written, log_probs, reasons, strict=True)
        ]

    def _ids(self, prompt: Prompt, prefix: Prefix | None) -> list[int]:
        """A prompt's ids, after the end token with which every document begins unless there is a prefix."""
        if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
            return list(cast("Sequence[int]", prompt))
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat(cast("Sequence[Message]", prompt))
        begun = prefix is not None or (not isinstance(prompt, str) and self.tokenizer.begins(ids))
        return ids if begun else [self.tokenizer.end, *ids]

    def chat(self, messages: str | Sequence[Message], config: Config | None = None, **options: Any) -> str:
        """The assistant's reply to a conversation; see `generate` for the other arguments and errors.

        Args:
            messages: with "role" and "content", the user's last; or the text of a user's only message.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate([messages], config, **options)[0].text

    def embed(self, texts: str | Sequence[str]) -> Float[Tensor, " *n d"]:
        """A vector for each text: the mean over its tokens of the backbone's outputs, in float32 on the CPU.

        Args:
            texts: one, which gives (d,), or several, which give (n, d).
        """
        if isinstance(texts, str):
            return self.embed([texts])[0]
        layout = Layout(causal=not self.diffusion)
        device = next(self.model.parameters()).device
        rows = [torch.tensor([self._ids(text, None)], device=device) for text in texts]
        with evaluating(self.model), torch.inference_mode():
            found = [self.model.hidden(row, layout).y[0].float().mean(0).cpu() for row in rows]
        return torch.stack(found) if found else torch.zeros(0, self.model.config.backbone.dim)

    def to(self, device: str | torch.device) -> TextGenerator:
        """Move the model to a device; returns itself.

        Raises:
            ConfigError: there is no such device.
        """
        self.model.to(usable_device(str(device)))
        return self

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer into a folder that `omnimix.load` takes."""
        save_model(self.model, folder)
        self.tokenizer.save(folder)

    def _config(self, config: Config | None, options: Mapping[str, Any] = {}) -> Config:
        wanted = DiffusionConfig if self.diffusion else GenerationConfig
        check_known(options, [field.name for field in fields(wanted)])
        config = wanted() if config is None else config
        if not isinstance(config, wanted):
            raise ConfigError(
                f"config is a {type(config).__name__}, and objective {self.model.config.objective.type!r} is decoded "
                f"with a {wanted.__name__}"
            )
        config = replace(config, **options) if options else config
        config = replace(config, end=self.tokenizer.end) if config.end is None else config
        if isinstance(config, GenerationConfig) and self.model.vocab_size > self.tokenizer.vocab_size:
            beyond = range(self.tokenizer.vocab_size, self.model.vocab_size)
            config = replace(config, forbidden=(*config.forbidden, *beyond))
        return config
