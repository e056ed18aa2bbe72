"""Conversations as text, by the same Jinja templates that Hugging Face's tokenizers carry."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import ConfigError

Message = Mapping[str, Any]

# What a role's turn begins and ends with in ChatML; the default template needs both.
TURN = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _refuse(message: str) -> None:
    raise ConfigError(f"messages: the chat template refuses them: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ConfigError unless each message has a role and a content, both strings."""
    if not messages:
        raise ConfigError("messages: there are none; a conversation has at least one")
    for i, message in enumerate(messages):
        for part in ("role", "content"):
            found = message.get(part) if isinstance(message, Mapping) else None
            if not isinstance(found, str):
                raise ConfigError(f"messages[{i}].{part} is {found!r}; it must be a string")


def render(template: str, messages: Sequence[Message], *, generate: bool, variables: Mapping[str, Any]) -> str:
    """The messages as text. The template runs in Jinja's sandbox and can change nothing.

    Args:
        generate: whether to end with what an answer of the assistant begins with.
        variables: what else the template may use, such as `bos_token`.

    Raises:
        ConfigError: messages without role or content, a broken template, or one that refuses the messages.
    """
    check_messages(messages)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=generate, **variables)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template fails: {type(error).__name__}: {error}") from error


class Guard:
    """Keeps what users write from being taken for special tokens once it stands inside a rendered template.

    Names of special tokens inside messages are replaced before rendering by marks which no message contains, and
    put back after the text has been cut at the special tokens that the template itself wrote.
    """

    def __init__(self, special: Sequence[str], messages: Sequence[Message]):
        self.special = list(special)
        self._names = pattern(self.special)
        written = "".join(value for m in messages for value in m.values() if isinstance(value, str))
        # Noncharacters: Unicode reserves them for uses like this.
        free = [mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in written]
        if not free:
            raise ConfigError("messages hold every one of the 32 noncharacters U+FDD0 to U+FDEF")
        self._mark = free[0]
        self.messages = [{key: self._hide(value) for key, value in m.items()} for m in messages]

    def _hide(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return self._names.sub(lambda found: f"{self._mark}{self.special.index(found[0])}{self._mark}", value)

    def pieces(self, text: str) -> list[tuple[str, bool]] | None:
        """(piece, whether it is a special token) of rendered text; None where nothing was hidden in it."""
        if self._mark not in text:
            return None
        shown = re.compile(f"{self._mark}([0-9]+){self._mark}")
        cut = [(piece, i % 2 == 1) for i, piece in enumerate(self._names.split(text)) if piece]
        return [(shown.sub(lambda found: self.special[int(found[1])], piece), special) for piece, special in cut]


def pattern(special: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first, as a group; nothing where there are none."""
    names = sorted(special, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")


def turns(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces: (text, whether the assistant wrote it).

    A piece of the assistant begins after what it is prompted with, and ends with what closes its turn.

    Raises:
        ConfigError: the template renders a beginning otherwise once more follows, so that the turns cannot be told.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if i == 0:
            raise ConfigError("messages[0].role is 'assistant'; nothing is there for it to answer")
        for count, generate, answer in ((i, True, False), (i + 1, False, True)):
            text = render(template, messages[:count], generate=generate, variables=variables)
            if not text.startswith(done):
                raise ConfigError("the chat template rewrites earlier turns, so that answers cannot be told from them")
            pieces.append((text[len(done) :], answer))
            done = text
    text = render(template, messages, generate=False, variables=variables)
    if not text.startswith(done):
        raise ConfigError("the chat template rewrites earlier turns, so that answers cannot be told from them")
    pieces.append((text[len(done) :], False))
    return [piece for piece in pieces if piece[0]]
