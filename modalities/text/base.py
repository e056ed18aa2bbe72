"""What every tokenizer is: text to token ids and back, whole or as a stream, and conversations."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UnsupportedShape
from .chat import TURN, Guard, Message, check_messages, render, turns


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1.
        special: ids of the special tokens by name. They are never read out of text unless that is asked for.
        end: the id that stands before and after every document.
        template: the chat template: as given, or ChatML's where `<|im_start|>` and `<|im_end|>` are special tokens;
            otherwise None.
        variables: what else a template may use: `bos_token`, `eos_token`, ... by name.
    """

    vocab_size: int
    special: dict[str, int]
    end: int
    template: str | None
    variables: dict[str, str]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The ids of each text, nothing added.

        Args:
            special: whether names of special tokens in a text mean these tokens. Never for text of unknown origin.

        Raises:
            ConfigError: a text has a lone surrogate, which no encoding can write.
        """

    @abstractmethod
    def _decode(self, ids: list[int], special: bool) -> str: ...

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that decides how text is encoded; it goes into JSON."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into the folder, whole or not at all; `load_tokenizer` reads it."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of one text; see `encode_batch`."""
        return self.encode_batch([text], special=special)[0]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            special: whether special tokens are shown by their names; they are left out by default.

        Raises:
            UnsupportedShape: an id outside the vocabulary.
        """
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UnsupportedShape(
                f"ids reach from {min(ids)} to {max(ids)}, and the tokenizer knows 0 to {self.vocab_size - 1}"
            )
        return self._decode(ids, special)

    def document(self, text: str) -> list[int]:
        """[end] + the text's ids + [end]."""
        return [self.end, *self.encode(text), self.end]

    def stream(self) -> TextStream:
        """For text that arrives token by token."""
        return TextStream(self)

    @property
    def fingerprint(self) -> str:
        """The same for tokenizers that encode everything alike."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()

    def _chat_template(self) -> str:
        if self.template is None:
            raise ConfigError(
                f"this tokenizer has no chat template, and ChatML's needs the special tokens {' and '.join(TURN)}: "
                f"train it with special={list(TURN)}, or put a chat_template.jinja next to its tokenizer.json"
            )
        return self.template

    def chat(
        self,
        messages: Sequence[Message],
        *,
        generate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation by the chat template; to encode messages use `encode_chat`.

        Args:
            messages: each with "role" and "content": text, a list of parts, or None next to "tool_calls".
            generate: whether to end with what an answer of the assistant begins with.
            tools: JSON schemas of functions that the assistant may call.
            documents: texts that it may refer to, each with "title" and "text".
            variables: what else the template reads, such as `enable_thinking`.

        Raises:
            ConfigError: messages without role or content; no template; one that is broken, computes without bounds or
                refuses the messages.
        """
        given = {**(variables or {}), "tools": tools, "documents": documents}
        return render(self._chat_template(), messages, generate=generate, variables={**self.variables, **given})

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        generate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of `chat(messages)`. Names of special tokens in what is passed stay ordinary text."""
        guard = Guard(list(self.special), messages, {**(variables or {}), "tools": tools, "documents": documents})
        values = {**self.variables, **guard.variables}
        text = render(self._chat_template(), guard.messages, generate=generate, variables=values)
        return self._encode_guarded(text, guard)

    def chat_document(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A conversation to train on: its ids between two end tokens, and which of them the assistant generates.

        What closes the assistant's turns counts as generated by it, unless the template says otherwise.

        Raises:
            ConfigError: as `chat`; or the template rewrites earlier turns.
        """
        check_messages(messages)
        guard = Guard(list(self.special), messages, {})
        ids: list[int] = []
        counted: list[bool] = []
        for text, answer in turns(self._chat_template(), guard.messages, self.variables):
            piece = self._encode_guarded(text, guard)
            ids += piece
            counted += [answer] * len(piece)
        if not self.begins(ids):
            ids, counted = [self.end, *ids], [False, *counted]
        return [*ids, self.end], [*counted, messages[-1]["role"] == "assistant"]

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether a rendered conversation begins with a token that a document begins with: the template wrote it."""
        return bool(ids) and ids[0] in (self.end, self.special.get(self.variables.get("bos_token", "")))

    def _encode_guarded(self, text: str, guard: Guard) -> list[int]:
        pieces = guard.pieces(text)
        if pieces is None:
            return self.encode(text, special=True)
        parts = [[self.special[piece]] if special else self.encode(piece) for piece, special in pieces]
        return [i for part in parts for i in part]


class TextStream:
    """Text out of tokens one by one, given as soon as it cannot change any more.

    What `push` and `flush` return adds up to what the tokenizer decodes from all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """What this token completes: often a word, nothing inside a character of several bytes."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._new(text)

    def flush(self) -> str:
        """What is left at the end; a character that is still incomplete becomes U+FFFD."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            # The last token stays as the left neighbour of the next: some decoders treat a first token otherwise.
            self._ids = self._ids[-1:]
            self._shown = self._tokenizer.decode(self._ids)
        return new
