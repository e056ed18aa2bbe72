"""Text to token ids and back: bytes, BPE trained here, and any tokenizer of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...errors import CheckpointError, ConfigError, OmnimixError, UnknownName
from ...utils.files import replace_file
from .base import TextStream, Tokenizer
from .chat import CHATML, TURN, pattern

__all__ = ["END", "BPETokenizer", "ByteTokenizer", "TextStream", "Tokenizer", "load_tokenizer", "train_bpe"]

END = "<|endoftext|>"
FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# A key of the configuration that transformers does not read: the token that ends documents.
OWN_END = "omnimix_end"

# What ends a document is called otherwise in every family; looked for in this order.
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>", "<EOS>", "[EOS]", "[SEP]")

# A word with what introduces it (" is", ".append", "_name"), one digit, punctuation together with the line end and the
# indentation after it ("):\n        "), blank lines with indentation, other space. On Python's standard library a
# vocabulary of 4096 so reaches 3.47 bytes a token, where GPT-2's pattern, which cuts indentation up, reaches 3.27.
WORDS = r"(?:[^\s\p{L}\p{N}]| )?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:[ \t]*[\r\n]\s*)?|\s*[\r\n][ \t]*|\s+(?!\S)|\s+"


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, followed by the end token and any other special tokens.

    Args:
        special: names of further special tokens.
        template: a chat template.
    """

    def __init__(self, special: Sequence[str] = (), *, template: str | None = None):
        names = _special_names(special)
        self.special = {name: 256 + i for i, name in enumerate(names)}
        self.vocab_size, self.end = 256 + len(names), self.special[END]
        self.variables = {"bos_token": END, "eos_token": END}
        self.template = _template(template, self.special)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        names = pattern(list(self.special) if special else [])
        encoded = []
        for text in texts:
            _writable(text)
            ids: list[int] = []
            for i, piece in enumerate(names.split(text)):
                ids += [self.special[piece]] if i % 2 else piece.encode()
            encoded.append(ids)
        return encoded

    def _decode(self, ids: list[int], special: bool) -> str:
        names = {i: name.encode() if special else b"" for name, i in self.special.items()}
        return b"".join(names[i] if i >= 256 else bytes((i,)) for i in ids).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {
            "omnimix": "bytes",
            "special": [name for name in self.special if name != END],
            "template": self.template,
        }

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / FILE, json.dumps(self.state(), indent=1))


class BPETokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    Args:
        inner: what it adds, cuts or fills up by itself is switched off.
        end: name of the token that ends documents; None looks for the usual ones.
        template: a chat template.
        variables: what it may use next to the messages, such as `bos_token`; the end token by default.

    Raises:
        UnknownName: unknown token `end`.
        ConfigError: none of the usual end tokens is there.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        end: str | None = None,
        template: str | None = None,
        variables: Mapping[str, str] | None = None,
    ):
        self._plain = tokenizers.Tokenizer.from_str(inner.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        # A second one: the switch belongs to the tokenizer, and calls may come from several threads.
        self._special = tokenizers.Tokenizer.from_str(self._plain.to_str())
        self._plain.encode_special_tokens = True
        self.special = _special_of(self._plain)
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        name = end if end is not None else next((name for name in _ENDS if name in self.special), None)
        if name is None:
            raise ConfigError(
                f"the tokenizer has none of the usual end tokens ({', '.join(_ENDS)}); name one with end=..., its "
                f"special tokens are: {', '.join(self.special) or 'none'}"
            )
        found = self._plain.token_to_id(name)
        if found is None:
            raise UnknownName("token of this tokenizer", name, self.special)
        if name not in self.special:
            for inner in (self._plain, self._special):
                inner.add_special_tokens([name])
            self.special[name] = found
        self.end = found
        self.variables = {"bos_token": name, "eos_token": name, "pad_token": name} | dict(variables or {})
        self.template = _template(template, self.special)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; ConfigError too where the tokenizer fails, as without an unknown token."""
        for text in texts:
            _writable(text)
        inner = self._special if special else self._plain
        with _Failures(ConfigError, "the tokenizer cannot encode the text"):
            return [encoding.ids for encoding in inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int], special: bool) -> str:
        with _Failures(ConfigError, "the tokenizer cannot decode the ids"):
            return self._plain.decode(ids, skip_special_tokens=not special)

    def state(self) -> dict[str, Any]:
        inner = json.loads(self._special.to_str())
        return {"tokenizer": inner, "end": self.end, "template": self.template, "variables": self.variables}

    def save(self, folder: str | Path) -> None:
        """Write what transformers' AutoTokenizer reads too: `tokenizer.json` and `tokenizer_config.json`."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.variables
        config[OWN_END] = self._plain.id_to_token(self.end)
        if self.template is not None:
            config["chat_template"] = self.template
        _write(Path(folder) / CONFIG, json.dumps(config, indent=1, ensure_ascii=False))
        _write(Path(folder) / FILE, self._special.to_str(pretty=True))


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> BPETokenizer:
    """Byte-level BPE (arXiv 1508.07909, on bytes as GPT-2 does), which encodes any text and loses nothing.

    Args:
        texts: read once.
        vocab_size: how many tokens, special ones included; fewer where the texts have no more pairs to join.
        special: names of further special tokens, such as `chat.TURN`.

    Raises:
        ConfigError: a vocabulary that does not hold the 256 bytes and the special tokens.
    """
    names = _special_names(special)
    if vocab_size < 256 + len(names):
        raise ConfigError(f"vocab_size is {vocab_size}; the bytes and {len(names)} special tokens need more")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BPETokenizer(inner, end=END)


def load_tokenizer(path: str | Path, *, end: str | None = None) -> Tokenizer:
    """The tokenizer of a run, of a saved model, or of any Hugging Face repository on disk.

    Args:
        path: a folder that holds `tokenizer.json`, or such a file. The chat template is taken from
            `chat_template.jinja` or `tokenizer_config.json` next to it.
        end: name of the token that ends documents; None takes the one it was saved with, looks for the usual ones, then
            takes the `eos_token` of `tokenizer_config.json`.

    Raises:
        CheckpointError: no such file, or a corrupt one.
        UnknownName, ConfigError: see `BPETokenizer`.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    content = _read_json(file)
    if content.get("omnimix") == "bytes":
        special, template = content.get("special"), content.get("template")
        if not isinstance(special, list) or not all(isinstance(name, str) for name in special):
            raise CheckpointError(f"{file} is corrupt: 'special' is {special!r} and not a list of names")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{file} is corrupt: 'template' is {template!r} and not text")
        if end not in (None, END):
            raise UnknownName("end token of bytes", end, [END])
        return ByteTokenizer(special, template=template)
    config = _read_json(file.with_name(CONFIG)) if file.with_name(CONFIG).is_file() else {}
    with _Failures(CheckpointError, f"{file} is not a tokenizer"):
        inner = tokenizers.Tokenizer.from_file(str(file))
        # Some files load, and fail where they are written or used.
        tokenizers.Tokenizer.from_str(inner.to_str())
    if not inner.get_vocab_size(with_added_tokens=True):
        raise CheckpointError(f"{file} is not a tokenizer: it has no tokens")
    end = _name(config.get(OWN_END)) if end is None else end
    if end is None and not any(name in _ENDS for name in _special_of(inner)):
        end = _name(config.get("eos_token"))
    keys = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = {key: name for key in keys if (name := _name(config.get(key))) is not None}
    return BPETokenizer(inner, end=end, template=_read_template(file, config), variables=named)


def _special_of(inner: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in sorted(inner.get_added_tokens_decoder().items()) if token.special}


def _read_template(file: Path, config: Mapping[str, Any]) -> str | None:
    beside = file.with_name(TEMPLATE)
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{beside} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (entry for entry in template if isinstance(entry, dict))
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _name(token: Any) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) and name else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no tokenizer: {file} does not exist") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file} is corrupt: its brackets are nested too deeply") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is corrupt: it holds a {type(content).__name__} and not an object")
    return content


class _Failures:
    """Makes an error of ours of what the `tokenizers` library raises: plain `Exception`s, and panics of Rust.

    A panic is no `Exception` at all, so that it would pass by whoever handles errors.
    """

    def __init__(self, error: type[OmnimixError], what: str):
        self.error, self.what = error, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise self.error(f"{self.what}: {str(error)[:1000]}") from error


def _special_names(further: Sequence[str]) -> list[str]:
    names = [END, *(name for name in further if name != END)]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"special is {list(further)}; names must be different and not empty")
    return names


def _writable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text: character {error.start} is a lone surrogate, which UTF-8 cannot write") from error


def _template(template: str | None, special: Mapping[str, int]) -> str | None:
    return CHATML if template is None and all(name in special for name in TURN) else template


def _write(file: Path, content: str) -> None:
    replace_file(file, lambda beside: beside.write_text(content, encoding="utf-8"))
