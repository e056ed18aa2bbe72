"""How an lm-eval task wants texts to be written, in our terms."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedCall
from ..modalities.text.tokenizer import Tokenizer

# What tasks call the most tokens to write, and other options, by our names.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OPTIONS = {name: name for name in ("top_k", "top_p", "min_p", "repetition_penalty", "length_penalty")}
_OPTIONS |= {"num_beams": "num_beams"}


class WritingOptions:
    """What a task's `generation_kwargs` say.

    Args:
        wanted: the `generation_kwargs`.
        most: tokens to write where they do not say.
        tokenizer: the model's.

    Attributes:
        most: tokens to write.
        temperature: 0 is greedy.
        until: strings before which a text ends.
        stop: tokens before which it ends.
        others: further options, by the names of `GenerationConfig`.

    Raises:
        UnsupportedCall: an option that is not known.
    """

    def __init__(self, wanted: dict[str, Any], most: int, tokenizer: Tokenizer):
        wanted = dict(wanted)
        until = wanted.pop("until", None) or []
        until = [until] if isinstance(until, str) else [string for string in until if string]
        given = [wanted.pop(name) for name in _MOST if name in wanted]
        sample, temperature = wanted.pop("do_sample", None), wanted.pop("temperature", None)
        if sample is False:
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0 if sample else 0.0
        unknown = sorted(wanted.keys() - _OPTIONS.keys())
        if unknown:
            known = ", ".join(("until", "do_sample", "temperature", *_MOST, *_OPTIONS))
            raise UnsupportedCall(f"generation_kwargs: {', '.join(unknown)} is not known; known: {known}")
        # Texts do not show special tokens, so that where one of them ends a text the token itself is looked for.
        self.stop = [tokenizer.special[string] for string in until if string in tokenizer.special]
        # 0 is no top-k for transformers, by whose names tasks go.
        self.others = {
            _OPTIONS[name]: value
            for name, value in wanted.items()
            if value is not None and (name, value) != ("top_k", 0)
        }
        self.most, self.temperature = int(given[0]) if given else most, float(temperature)
        self.until, self.tokenizer = until, tokenizer

    def cut(self, text: str, tokens: list[int]) -> str:
        """The text, or that of the tokens before the first of those that end one."""
        ends = [tokens.index(token) for token in self.stop if token in tokens]
        if not ends:
            return text
        text = self.tokenizer.decode(tokens[: min(ends)])
        return text[: min((text.index(string) for string in self.until if string in text), default=None)]
