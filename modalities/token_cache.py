"""Tokens of a corpus on the disk: written once, whole or not at all, and read as memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError, ConfigError, MediaError
from ..files import replace_file
from ..kernels.native import cache_folder
from .corpus import Corpus, Document, held_out, place
from .text import WORDS, BPETokenizer, Tokenizer, load_tokenizer, train_bpe

# Of the layout of the files and of how documents are encoded: older files are then not read.
_VERSION = 1
_MAGIC = b"omnixtok"
_BATCH = 1 << 20  # characters that are encoded at a time
_SAMPLE = 64 << 20  # bytes of text from which a vocabulary is learnt


def text_cache() -> Path:
    """Where tokens are kept: one folder a user."""
    return cache_folder().parent / "text"


class TokenCache:
    """The tokens of all documents of a corpus, behind each other, in one file.

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
            if zlib.crc32(whole) != footer["crc"]:
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
    """Writes arrays behind each other, padded to 8 bytes, with a checksum of everything."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.crc, self.written = stream, 0, 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.crc, self.written = zlib.crc32(data, self.crc), self.written + len(data)

    def pad(self) -> None:
        self.write(bytes(_padded(self.written) - self.written))


def write_tokens(
    file: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    answers_only: bool = False,
    problems: Callable[[], dict[str, str]] = dict,
) -> None:
    """Encode documents into a file that `TokenCache` reads; an interrupt leaves what was there before.

    Args:
        answers_only: of conversations only what the assistant wrote is scored.
        problems: asked at the end for what could not be read.
    """
    kind = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)

    def write(beside: Path) -> None:
        offsets, sizes, places = array("q", [0]), array("q"), array("Q")
        marks: list[bytes] = []
        with beside.open("wb") as stream:
            writer = _Writer(stream)
            for batch in _batches(documents):
                for document, (ids, counted, size) in zip(batch, _encode(batch, tokenizer, answers_only), strict=True):
                    writer.write(np.asarray(ids, kind).tobytes())
                    if answers_only:
                        marks.append(np.asarray(counted, np.uint8).tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    sizes.append(size)
                    places.append(place(document.key))
            writer.pad()
            parts = {"tokens": kind.str, "offsets": "<i8", "text_bytes": "<i8", "places": "<u8"}
            counts = {"tokens": offsets[-1], "offsets": len(offsets), "text_bytes": len(sizes), "places": len(places)}
            for values in (offsets, sizes, places):
                writer.write(values.tobytes())
            if answers_only:
                parts["counted"], counts["counted"] = "|u1", offsets[-1]
                for mark in marks:
                    writer.write(mark)
                writer.pad()
            content = {"parts": parts, "counts": counts, "crc": writer.crc, "problems": problems()}
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
    batch: Sequence[Document], tokenizer: Tokenizer, answers_only: bool
) -> Iterator[tuple[list[int], list[bool], int]]:
    """For each document: its ids, which of them are scored, and the bytes of text that those stand for."""
    texts = iter(tokenizer.encode_batch([d.text for d in batch if d.messages is None]))
    for document in batch:
        if document.messages is None:
            ids = [tokenizer.end, *next(texts), tokenizer.end]
            yield ids, [True] * len(ids), len(document.text.encode())
        elif answers_only:
            ids, counted = tokenizer.chat_document(document.messages)
            answers = (m["content"] for m in document.messages if m["role"] == "assistant")
            yield ids, counted, sum(len(answer.encode()) for answer in answers)
        else:
            ids = [tokenizer.end, *tokenizer.encode_chat(document.messages, generate=False), tokenizer.end]
            yield ids, [], len(tokenizer.chat(document.messages, generate=False).encode())


def cached_tokens(
    corpus: Corpus, tokenizer: Tokenizer, *, folder: Path | None = None, answers_only: bool = False
) -> TokenCache:
    """The tokens of a corpus, encoded now or before.

    A file that is corrupt is written anew. Two processes that encode the same corpus do not harm each other.

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
        with _progress(corpus, "reading text into tokens") as documents:
            write_tokens(file, documents, tokenizer, answers_only=answers_only, problems=lambda: corpus.problems)
        cache = TokenCache(file)
    if corpus.policy == "raise" and cache.problems:
        name, reason = next(iter(cache.problems.items()))
        raise MediaError(f"{name} cannot be read: {reason} (policy 'skip' leaves it out)")
    if not len(cache):
        found = "; ".join(f"{name}: {reason}" for name, reason in list(cache.problems.items())[:3])
        raise ConfigError(f"the corpus has no text: {found or 'its files are empty'}")
    return cache


def cached_bpe(
    corpus: Corpus, vocabulary: int, *, val_part: float, special: Sequence[str] = (), folder: Path | None = None
) -> BPETokenizer:
    """A BPE tokenizer trained on the documents of a corpus that are not held out, now or before.

    Of a large corpus a part is enough, the same always: about 64 MB.

    Raises:
        MediaError, ConfigError: as `cached_tokens`, and `train_bpe`.
    """
    folder = text_cache() if folder is None else folder
    key = _key("bpe", corpus.fingerprint, vocabulary, val_part, list(special), WORDS, _SAMPLE)
    file = folder / f"bpe-{key}"
    try:
        tokenizer = load_tokenizer(file)
    except CheckpointError:
        part = min(1.0, _SAMPLE / max(1, corpus.nbytes))
        with _progress(corpus, f"learning {vocabulary} tokens") as documents:
            texts = (
                document.text or "\n".join(m["content"] for m in document.messages or [])
                for document in documents
                if not held_out(document.key, val_part) and place(document.key + " ") < part * 2**64
            )
            tokenizer = train_bpe(texts, vocabulary, special)
        tokenizer.save(file)
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:24]


def _clean(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left, a day ago or earlier."""
    for left in folder.glob(".*.part") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()


@contextlib.contextmanager
def _progress(corpus: Corpus, what: str) -> Iterator[Iterable[Document]]:
    """The documents, with a bar on a terminal."""
    if not sys.stderr.isatty():
        yield corpus
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=corpus.nbytes)

        def counted() -> Iterator[Document]:
            for document in corpus:
                yield document
                bar.advance(task, len(document.text) or sum(len(m["content"]) for m in document.messages or []))

        yield counted()
