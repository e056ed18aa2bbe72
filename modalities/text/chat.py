"""Conversations as text, by the same Jinja templates that Hugging Face's tokenizers carry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from . import sandbox

Message = Mapping[str, Any]

# What a role's turn begins and ends with in ChatML; the default template needs both.
TURN = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] or [] %}"
    "{% if 'text' not in part %}{{ raise_exception('parts of the type ' ~ part['type'] ~ ' are no text') }}{% endif %}"
    "{{ part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n' + ((call['function'] or call) | tojson) + '\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Names under which a message's reasoning is given; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# With one of these a message needs no content.
_INSTEAD = ("tool_calls", "function_call", *_REASONING)
# Noncharacters: Unicode reserves them for uses like these.
_NONCHARACTERS = [chr(i) for i in range(0xFDD0, 0xFDF0)]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ConfigError unless each message has a role and a content: text, parts with a type, or calls of tools."""
    if not messages:
        raise ConfigError("messages: there are none; a conversation has at least one")
    for i, message in enumerate(messages):
        message = message if isinstance(message, Mapping) else {}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ConfigError(f"messages[{i}].role is {role!r}; it must be a string")
        if content is None and any(message.get(name) for name in _INSTEAD):
            continue
        parts = content if isinstance(content, Sequence) else [None]
        if not isinstance(content, str) and not all(isinstance(p, Mapping) and "type" in p for p in parts):
            shown = repr(content)[:200]
            raise ConfigError(
                f"messages[{i}].content is {shown}; it must be a string, or a list of parts that have a 'type'"
            )


def plain(value: Any, where: str = "messages") -> Any:
    """A copy of JSON-like values, of plain types only.

    Raises:
        ConfigError: it holds anything else, or itself.
    """
    try:
        return _plain(value, where)
    except RecursionError as error:
        raise ConfigError(f"{where}: lists are nested too deeply") from error


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise ConfigError(f"{where}: a {type(value).__name__} is no part of a conversation; convert it to JSON's types")


def _as_templates_read(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without the keys that are None, as transformers passes them, with each name that reasoning has."""
    found = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        found.append(
            message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
        )
    return found


def render(
    template: str,
    messages: Sequence[Message],
    *,
    generate: bool,
    variables: Mapping[str, Any],
    marks: tuple[str, str] = ("", ""),
) -> str:
    """Render messages as transformers' `apply_chat_template` does, in a sandbox with bounds (see `sandbox.render`).

    Args:
        generate: whether to end with what an answer of the assistant begins with.
        variables: what else the template may use, such as `bos_token`, `tools` and `documents`.
        marks: what is put around the text of each `{% generation %}` block.

    Raises:
        ConfigError: messages without role or content, a broken template, or one that refuses the messages.
    """
    check_messages(messages)
    values = {"tools": None, "documents": None, **plain(variables, "variables")}
    values |= {"messages": _as_templates_read(plain(messages)), "add_generation_prompt": generate}
    return sandbox.render(template, values, marks=marks)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def unused_marks(count: int, *values: Any) -> list[str]:
    """Characters that occur in none of the strings in `values`.

    Raises:
        ConfigError: too few of the noncharacters are left.
    """
    used = {character for text in _strings(values) for character in _NONCHARACTERS if character in text}
    free = [character for character in _NONCHARACTERS if character not in used]
    if len(free) < count:
        raise ConfigError("messages hold nearly every one of the 32 noncharacters U+FDD0 to U+FDEF")
    return free[:count]


class Guard:
    """Keeps what users write from being taken for special tokens once it stands inside a rendered template.

    Names of special tokens inside messages are replaced before rendering by marks which no message contains, and
    put back after the text has been cut at the special tokens that the template itself wrote.
    """

    def __init__(self, special: Sequence[str], messages: Sequence[Message], variables: Mapping[str, Any]):
        self.special = list(special)
        self._names = pattern(self.special)
        messages, variables = plain(messages), plain(variables, "variables")
        (self._mark,) = unused_marks(1, messages, variables)
        self.messages = [self._hide(message) for message in messages]
        # What a caller gives, tools and documents; those of the tokenizer itself are its special tokens.
        self.variables = self._hide(variables)

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._names.sub(lambda found: f"{self._mark}{self.special.index(found[0])}{self._mark}", value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

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
    """The rendered conversation in pieces: (text, whether the assistant generates it).

    A template says so itself with `{% generation %}` blocks. Otherwise a piece of the assistant begins after what it is
    prompted with, and ends with what closes its turn.

    Raises:
        ConfigError: without such blocks the template renders a beginning otherwise once more follows, so that the
            turns cannot be told.
    """
    if sandbox.has_generation(template):
        # Of `Guard`'s mark, digits stand between two; the two marks here are others.
        marks = unused_marks(2, messages, variables, template)
        text = render(template, messages, generate=False, variables=variables, marks=(marks[0], marks[1]))
        parts = re.split(f"[{''.join(marks)}]", text)
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]
    pieces: list[tuple[str, bool]] = []
    done = ""
    ends = [(i, message) for i, message in enumerate(messages) if message.get("role") == "assistant"]
    steps = [(n, generate, not generate) for i, _ in ends for n, generate in ((i, True), (i + 1, False))]
    for length, generate, answer in [*steps, (len(messages), False, False)]:
        if not length:
            raise ConfigError("messages[0].role is 'assistant'; nothing is there for it to answer")
        text = render(template, messages[:length], generate=generate, variables=variables)
        if not text.startswith(done):
            raise ConfigError("the chat template rewrites earlier turns, so that answers cannot be told from them")
        pieces.append((text[len(done) :], answer))
        done = text
    return [piece for piece in pieces if piece[0]]
