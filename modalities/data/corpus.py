"""Where text comes from: files, rows of JSON or parquet, shards, the standard library. Read as documents."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import lzma
import math
import os
import sysconfig
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, MediaError, MissingPackage
from ..text.chat import check_messages
from .tar import BROKEN, end_problem, headers, member_problem, unpacker

# What reading compressed or broken files may raise.
_UNREADABLE = (OSError, zlib.error, lzma.LZMAError, *BROKEN)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, or one conversation.

    Args:
        name: where it stands, for people.
        key: what decides whether it is held out: its path for a file, its content for a row of a table, so that
            neither the order nor other documents matter and copies fall on one side.
        text: the text.
        messages: the conversation; then `text` is empty.
    """

    name: str
    key: str
    text: str = ""
    messages: list[dict[str, Any]] | None = None


def place(key: str) -> int:
    """A number in 0 … 2⁶⁴ − 1 from a document's key, spread evenly."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")


def held_out(key: str, part: float) -> bool:
    """Whether a document belongs to the `part` of all documents that is held out."""
    return float(place(key)) < part * 2**64


def split_fraction(documents: Iterable[Document], part: float) -> float:
    """The fraction to hold out of documents, so that there are some to train on and some to hold out.

    Few documents may all fall on one side by their keys. Then the one that comes next is on the other side alone.

    Args:
        documents: read until both sides have one.
        part: the fraction that is asked for, between 0 and 1.

    Returns:
        `part`, unless all documents fall on one side; for `held_out` and `TokenCache.held_out`.

    Raises:
        ConfigError: fewer than two different documents.
    """
    places: set[float] = set()
    for document in documents:
        if document.text or document.messages:
            places.add(float(place(document.key)))
            if min(places) < part * 2**64 <= max(places):
                return part
    if len(places) < 2:
        raise ConfigError(f"the text has {len(places)} documents; one to train on and one to validate on are needed")
    if min(places) >= part * 2**64:
        return math.nextafter(min(places), math.inf) / 2**64
    return max(places) / 2**64


class Corpus(ABC):
    """Documents in a fixed order, read anew each time they are iterated over.

    Args:
        path: a file, or a folder that is searched through.
        patterns: of the names of the files in a folder.
        apart: names of folders inside it that are left alone, as hidden ones are.
        policy: what an unreadable document does: "skip" leaves it out and counts it, "raise" stops.

    Attributes:
        files: (name, path), in order.
        problems: of the last pass: what was left out, by name, with the reason.

    Raises:
        ConfigError: no such file or folder, or no file in it fits.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        patterns: Sequence[str] = (),
        apart: Collection[str] = (),
        policy: Literal["skip", "raise"] = "skip",
    ):
        if policy not in ("skip", "raise"):
            raise ConfigError(f"policy is {policy!r}; it must be 'skip' or 'raise'")
        self.policy = policy
        self.files = find_files(Path(path), patterns, apart=apart)
        self.problems: dict[str, str] = {}

    @abstractmethod
    def _read(self, name: str, path: Path) -> Iterator[Document]: ...

    def options(self) -> list[Any]:
        """The options that decide, next to the files, which documents there are."""
        return []

    def __iter__(self) -> Iterator[Document]:
        self.problems = {}
        for name, path in self.files:
            try:
                yield from self._read(name, path)
            except _UNREADABLE as error:
                self.refuse(name, f"{type(error).__name__}: {error}")

    def refuse(self, name: str, reason: str) -> None:
        """Leave a document out and remember why, or stop, as the policy says.

        Raises:
            MediaError: under the policy "raise".
        """
        if self.policy == "raise":
            raise MediaError(f"{name} cannot be read: {reason} (policy 'skip' leaves it out)")
        self.problems[name] = reason

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(path.stat().st_size for _, path in self.files)

    @property
    def fingerprint(self) -> str:
        """Another one whenever a file changed, came, went or became readable."""
        stats = [(name, (found := path.stat()).st_size, found.st_mtime_ns, found.st_mode) for name, path in self.files]
        what = [type(self).__name__, self.options(), stats]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def find_files(path: Path, patterns: Sequence[str], *, apart: Collection[str] = ()) -> list[tuple[str, Path]]:
    """(name, path) of a file, or of all files in a folder whose names fit a pattern, sorted by their names.

    Args:
        apart: names of folders that are left alone, as hidden ones are.
    """
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise ConfigError(f"path is {str(path)!r}; there is no such file or folder")
    everything: list[Path] = []
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if name not in apart and not name.startswith(".")]
        # Editors leave hidden files and links to nowhere.
        everything += [p for name in names if not name.startswith(".") and (p := Path(folder, name)).is_file()]
    found = [p for p in everything if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]
    if not found:
        suffixes = sorted({p.suffix for p in everything if p.suffix})[:8]
        raise ConfigError(
            f"no file in {str(path)!r} fits the patterns {', '.join(patterns)}; "
            + (f"it holds files in {', '.join(suffixes)}" if suffixes else "it holds no files")
        )
    return sorted((p.relative_to(path).as_posix(), p) for p in found)


class TextFiles(Corpus):
    """UTF-8 files, each a document.

    Args:
        path: a file or folder.
        patterns, apart: see `Corpus`.
        section: characters after which a file is cut, at the next line, so that it gives several documents; None
            cuts nothing.
        policy: see `Corpus`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        patterns: Sequence[str] = ("*.txt", "*.md"),
        apart: Collection[str] = (),
        section: int | None = None,
        policy: Literal["skip", "raise"] = "skip",
    ):
        super().__init__(path, patterns=patterns, apart=apart, policy=policy)
        if section is not None and section < 1:
            raise ConfigError(f"section is {section}; it must be at least 1 character, or null")
        self.section = section

    def options(self) -> list[Any]:
        return [self.section]

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        text = path.read_bytes().decode()
        if self.section is None:
            yield Document(name=name, key=name, text=text)
            return
        start, count = 0, 0
        while start < len(text):
            line = text.find("\n", start + self.section - 1)
            stop = len(text) if line < 0 else line + 1
            yield Document(name=f"{name}#{count}", key=f"{name}#{count}", text=text[start:stop])
            start, count = stop, count + 1


def standard_library(*, policy: Literal["skip", "raise"] = "skip") -> TextFiles:
    """The sources of Python's standard library on this machine, 15 to 30 MB of real text.

    Some of its tests are written in other encodings; they are left out as all text that is not UTF-8 is.

    Raises:
        ConfigError: this Python comes without sources.
    """
    root = sysconfig.get_paths()["stdlib"]
    return TextFiles(root, patterns=("*.py",), apart=("site-packages", "dist-packages", "__pycache__"), policy=policy)


class Rows(Corpus):
    """Documents that are rows of a table, named by their file and number.

    Args:
        path: a file or folder.
        field: that holds the text, or the messages.
        chat: whether it holds messages, each with role and content.
        patterns: of file names in a folder; None are the usual ones.
        policy: see `Corpus`.
    """

    usual: tuple[str, ...]

    def __init__(
        self,
        path: str | Path,
        *,
        field: str = "text",
        chat: bool = False,
        patterns: Sequence[str] | None = None,
        policy: Literal["skip", "raise"] = "skip",
    ):
        super().__init__(path, patterns=self.usual if patterns is None else patterns, policy=policy)
        self.field, self.chat = field, chat

    def options(self) -> list[Any]:
        return [self.field, self.chat]

    def _document(self, name: str, value: Any) -> Iterator[Document]:
        """The document that a row's field holds, or none and a problem."""
        text, messages = "", None
        try:
            if self.chat:
                if not isinstance(value, list):
                    raise ConfigError(f"{self.field!r} is {type(value).__name__} and not a list of messages")
                check_messages(value)
                messages, content = value, json.dumps(value, ensure_ascii=False)
            elif not isinstance(value, str):
                raise ConfigError(f"{self.field!r} is {type(value).__name__} and not text")
            else:
                text = content = value
            key = hashlib.sha256(content.encode()).hexdigest()
        except (ConfigError, UnicodeEncodeError) as error:
            self.refuse(name, str(error))
            return
        yield Document(name=name, key=key, text=text, messages=messages)


class JsonLines(Rows):
    """Lines of JSON objects, each a document; .gz files too."""

    usual = ("*.jsonl", "*.ndjson", "*.jsonl.gz")

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = f"{name}:{number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
                    self.refuse(row, str(error))
                    continue
                yield from self._document(row, value.get(self.field) if isinstance(value, dict) else None)


class Parquet(Rows):
    """Rows of parquet files, as `datasets` writes them.

    Raises:
        MissingPackage: pyarrow is not installed.
    """

    usual = ("*.parquet",)

    def __init__(
        self,
        path: str | Path,
        *,
        field: str = "text",
        chat: bool = False,
        patterns: Sequence[str] | None = None,
        policy: Literal["skip", "raise"] = "skip",
    ):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingPackage("pyarrow", "reading parquet files", extra="parquet") from error
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        super().__init__(path, field=field, chat=chat, patterns=patterns, policy=policy)

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        try:
            file = self._parquet.ParquetFile(path)
            if self.field not in file.schema_arrow.names:
                self.refuse(name, f"it has no column {self.field!r}, but {', '.join(file.schema_arrow.names)}")
                return
            number = 0
            for batch in file.iter_batches(columns=[self.field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from self._document(f"{name}:{number}", value)
        except self._arrow.ArrowException as error:
            self.refuse(name, str(error))


class Shards(Rows):
    """webdataset shards: tar files whose .txt members are documents; of .json members the field is.

    With `chat` .txt members are left alone. Members before the cut of a truncated shard are kept.
    """

    usual = ("*.tar", "*.tar.gz", "*.tgz")

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        with tarfile.open(path, "r:*") as shard:
            for member in headers(shard):
                if not member.name.endswith((".txt", ".json")):
                    continue
                reason = member_problem(member)
                if reason is not None:
                    self.refuse(f"{name}/{member.name}", reason)
                elif member.isfile() and (opened := shard.extractfile(member)):
                    yield from self._member(f"{name}/{member.name}", opened.read())
            end = shard.offset
        with path.open("rb") as file:
            # Compressed files say themselves where they are cut.
            reason = None if unpacker(file) else end_problem(file, end)
        if reason is not None:
            self.refuse(name, reason)

    def _member(self, name: str, data: bytes) -> Iterator[Document]:
        try:
            if name.endswith(".txt"):
                if not self.chat:
                    yield from self._document(name, data.decode())
                return
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.refuse(name, str(error))
            return
        yield from self._document(name, value.get(self.field) if isinstance(value, dict) else None)
