"""Tokens of a corpus on the disk: written once, whole or not at all, and read as memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import CheckpointError, ConfigError, MediaError
from ...utils.cache import cache_folder
from ...utils.files import one_at_a_time, replace_file
from ...utils.log import logger_of, progress
from ..text.tokenizer import WORDS, Tokenizer, load_tokenizer, train_bpe
from .corpus import Corpus, Document, held_out, place

logger = logger_of(__name__)

# Changes with the layout of the files and with how documents are encoded: older files are then not read.
_VERSION = 1
_MAGIC = b"omnixtok"
_BATCH = 1 << 20  # characters that are encoded at a time
_SAMPLE = 64 << 20  # bytes of text from which a vocabulary is learned
_LONG = 1 << 20  # characters of a document of which a part may be taken for that


def text_cache() -> Path:
    """Where tokens are kept: one folder a user."""
    return cache_folder("text")


class TokenCache:
    """The tokens of all documents of a corpus, concatenated in one file.

    Args:
        file: what `write_tokens` wrote. It is checked as a whole.

    Attributes:
        tokens: (n,), uint16 or uint32, mapped from the file.
        counted: (n,), uint8: which tokens are scored; None where all are.
        offsets: (documents + 1,): where each document begins in `tokens`.
        text_bytes: (documents,): bytes of text that the scored tokens of each stand for.
        places: (documents,), uint64: `corpus.place` of each document's key.
        problems: the documents that could not be read, by name, with the reason.

    Raises:
        CheckpointError: there is no such file, or it is cut short or changed.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            size = file.stat().st_size
            footer, body = _read_footer(file, size)
            parts = {name: np.dtype(kind) for name, kind in footer["parts"].items()}
            whole = np.memmap(file, np.uint8, "r", shape=(body,)) if body else np.zeros(0, np.uint8)
            if zlib.crc32(whole.data) != footer["crc"]:
                raise CheckpointError(f"{file} is corrupt: its checksum is another")
            arrays, at = {}, 0
            for name, kind in parts.items():
                count = footer["counts"][name]
                arrays[name] = whole[at : at + count * kind.itemsize].view(kind)
                at += _padded(count * kind.itemsize)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        self.tokens, self.offsets = arrays["tokens"], np.array(arrays["offsets"])
        self.text_bytes, self.places = np.array(arrays["text_bytes"]), np.array(arrays["places"])
        self.counted = arrays.get("counted")
        self.problems: dict[str, str] = footer["problems"]

    def __getstate__(self) -> Path:
        # A worker maps the file itself: pickled, the tokens would be copied.
        return self.file

    def __setstate__(self, file: Path) -> None:
        self.__init__(file)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.text_bytes)

    def held_out(self, part: float) -> np.ndarray:
        """(documents,), bool: see `corpus.held_out`."""
        return self.places.astype(np.float64) < part * 2**64


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _read_footer(file: Path, size: int) -> tuple[dict[str, Any], int]:
    tail = 8 + len(_MAGIC)
    with file.open("rb") as stream:
        stream.seek(max(0, size - tail))
        end = stream.read()
        if len(end) < tail or end[8:] != _MAGIC:
            raise CheckpointError(f"{file} is cut short")
        length = int.from_bytes(end[:8], "little")
        if length > size - tail:
            raise CheckpointError(f"{file} is corrupt: its footer is longer than the file")
        stream.seek(size - tail - length)
        return json.loads(stream.read(length)), size - tail - length


class _Writer:
    """Writes arrays one after another, padded to 8 bytes, with a checksum of everything."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.crc, self.written = stream, 0, 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.crc, self.written = zlib.crc32(data, self.crc), self.written + len(data)

    def pad(self) -> None:
        self.write(bytes(_padded(self.written) - self.written))


def write_tokens(
    file: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    answers_only: bool = False,
    seen: Callable[[Document], None] = lambda document: None,
) -> None:
    """Encode a corpus into a file that `TokenCache` reads; an interrupt leaves what was there before.

    Args:
        answers_only: of conversations only what the assistant wrote is scored.
        seen: is called with every document, for whoever watches.
    """
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, sizes, places = array("q", [0]), array("q"), array("Q")
    marks: list[bytes] = []

    def write(beside: Path) -> None:
        with beside.open("wb") as stream:
            writer = _Writer(stream)
            for batch in _batches(corpus):
                for document, ids, counted, size in _encode(batch, corpus, tokenizer, answers_only):
                    writer.write(np.asarray(ids, kind).tobytes())
                    marks.append(np.asarray(counted, np.uint8).tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    sizes.append(size)
                    places.append(place(document.key))
                    seen(document)
            writer.pad()
            parts = {"tokens": kind.str, "offsets": "<i8", "text_bytes": "<i8", "places": "<u8"}
            counts = {"tokens": offsets[-1], "offsets": len(offsets), "text_bytes": len(sizes), "places": len(places)}
            for values in (offsets, sizes, places):
                writer.write(values.tobytes())
            if answers_only:
                parts["counted"], counts["counted"] = "|u1", offsets[-1]
                writer.write(b"".join(marks))
                writer.pad()
            content = {"parts": parts, "counts": counts, "crc": writer.crc, "problems": corpus.problems}
            footer = json.dumps(content).encode()
            stream.write(footer + len(footer).to_bytes(8, "little") + _MAGIC)

    replace_file(file, write)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if not document.text and document.messages is None:
            continue  # an empty file is no text
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: Sequence[Document], corpus: Corpus, tokenizer: Tokenizer, answers_only: bool
) -> Iterator[tuple[Document, list[int], list[bool], int]]:
    """Each document with its ids, which of them are scored (nothing: all), and the bytes that those stand for."""
    texts = iter(tokenizer.encode_batch([d.text for d in batch if d.messages is None]))
    for document in batch:
        if document.messages is None:
            yield document, [tokenizer.end, *next(texts), tokenizer.end], [], len(document.text.encode())
            continue
        try:
            conversation = _encode_chat(document.messages, tokenizer, answers_only)
        except ConfigError as error:  # the template refuses it
            corpus.refuse(document.name, str(error))
            continue
        yield document, *conversation


def _encode_chat(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, answers_only: bool
) -> tuple[list[int], list[bool], int]:
    if answers_only:
        ids, scored = tokenizer.chat_document(messages)
        answers = [m for m in messages if m["role"] == "assistant"]
        if all(isinstance(m.get("content"), str) and not m.get("tool_calls") for m in answers):
            return ids, scored, sum(len(m["content"].encode()) for m in answers)
        # Parts and calls are text only once the template has rendered them.
        text = tokenizer.decode([i for i, own in zip(ids, scored, strict=True) if own])
        return ids, scored, len(text.encode())
    ids = tokenizer.encode_chat(messages, generate=False)
    ids = [*([] if tokenizer.begins(ids) else [tokenizer.end]), *ids, tokenizer.end]
    return ids, [], len(tokenizer.decode(ids).encode())


def cached_tokens(
    corpus: Corpus, tokenizer: Tokenizer, *, folder: Path | None = None, answers_only: bool = False
) -> TokenCache:
    """The tokens of a corpus, encoded now or before.

    A file that is corrupt is written anew. One of several processes encodes, and the others wait for it.

    Args:
        folder: of the cache; `text_cache()` by default.
        answers_only: see `write_tokens`.

    Raises:
        MediaError: a document cannot be read, and the corpus' policy is "raise".
        ConfigError: the corpus has no readable text.
    """
    folder = text_cache() if folder is None else folder
    key = _key("tokens", corpus.fingerprint, tokenizer.fingerprint, answers_only)
    file = folder / f"tokens-{key}.bin"
    try:
        cache = TokenCache(file)
    except CheckpointError:
        _clean(folder)
        with _writing(folder), one_at_a_time(file):
            cache = _made_anew(file, corpus, tokenizer, answers_only)
    if corpus.policy == "raise" and cache.problems:
        name, reason = next(iter(cache.problems.items()))
        raise MediaError(f"{name} cannot be read: {reason} (policy 'skip' leaves it out)")
    if not len(cache):
        found = "; ".join(f"{name}: {reason}" for name, reason in list(cache.problems.items())[:3])
        raise ConfigError(f"the corpus has no text: {found or 'its files are empty'}")
    return cache


def _made_anew(file: Path, corpus: Corpus, tokenizer: Tokenizer, answers_only: bool) -> TokenCache:
    # Another process may have made it while this one waited for its turn.
    with contextlib.suppress(CheckpointError):
        return TokenCache(file)
    with _progress(corpus, "reading text into tokens") as seen:
        write_tokens(file, corpus, tokenizer, answers_only=answers_only, seen=seen)
    return TokenCache(file)


def cached_bpe(
    corpus: Corpus, vocab_size: int, *, val_fraction: float, special: Sequence[str] = (), folder: Path | None = None
) -> Tokenizer:
    """A BPE tokenizer trained on the documents of a corpus that are not held out, now or before.

    Of a large corpus a part is enough, the same always: about 64 MB.

    Raises:
        MediaError, ConfigError: as `cached_tokens`, and `train_bpe`.
    """
    folder = text_cache() if folder is None else folder
    key = _key("bpe", corpus.fingerprint, vocab_size, val_fraction, list(special), WORDS, _SAMPLE)
    file = folder / f"bpe-{key}"
    try:
        return load_tokenizer(file)
    except CheckpointError:
        with _writing(folder), one_at_a_time(file):
            with contextlib.suppress(CheckpointError):  # another process may have trained it in the meantime
                return load_tokenizer(file)
            part = min(1.0, _SAMPLE / max(1, corpus.nbytes))
            with _progress(corpus, f"learning {vocab_size} tokens") as seen:
                tokenizer = train_bpe(_texts(corpus, val_fraction, part, seen), vocab_size, special)
            tokenizer.save(file)
            return tokenizer


def _texts(corpus: Corpus, val_fraction: float, part: float, seen: Callable[[Document], None]) -> Iterator[str]:
    for document in corpus:
        seen(document)
        if held_out(document.key, val_fraction):
            continue
        text = document.text or "\n".join(m["content"] for m in document.messages or [])
        # Chance might choose none of few long documents: a fraction of each is taken.
        if part < 1 and len(text) > _LONG:
            yield text[: round(part * len(text))]
        # Whether one of many is read follows from its name too, but independently of what is held out.
        elif held_out(f"{document.key} ", part):
            yield text


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:24]


def _clean(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left, a day ago or earlier."""
    for left in folder.glob(".*.part") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except MediaError:  # of a document
        raise
    except OSError as error:
        raise ConfigError(f"the cache {str(folder)!r} cannot be written: {error}; choose another folder") from error


@contextlib.contextmanager
def _progress(corpus: Corpus, what: str) -> Iterator[Callable[[Document], None]]:
    """What is to be called with each document."""
    with progress(logger, what, corpus.nbytes, level=logging.DEBUG) as advance:
        yield lambda d: advance(len(d.text) or sum(len(m["content"]) for m in d.messages or []))
