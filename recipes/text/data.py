"""Text for the recipes: the standard library, files, JSON lines, conversations, parquet, shards."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ...modalities.data import corpus as corpora
from ...modalities.data.corpus import Corpus
from ...modalities.text.chat import TURN
from .base import OPTIONS, TextData, TextOptions

__all__ = ["ChatLines", "JsonLines", "Parquet", "Shards", "StandardLibrary", "TextData", "TextFiles", "TextOptions"]


class StandardLibrary(TextData):
    """The sources of Python's standard library on this machine: real text that is always there."""

    def corpus(self) -> Corpus:
        return corpora.standard_library(policy=self.options.policy)


class TextFiles(TextData):
    """UTF-8 files, each a document.

    Args:
        path: a file, or a folder that is searched through.
        patterns: of the names of the files in a folder.
        section: characters after which a file is cut at the next line into documents; null cuts nothing.
        options: what all text data sets take.
    """

    _more_documents = ": cut files into documents, for example with --data.section 20000"

    def __init__(
        self,
        *,
        path: str,
        patterns: list[str] = ["*.txt", "*.md"],  # noqa: B006 - jsonargparse cannot write a factory's value
        section: int | None = None,
        options: TextOptions = OPTIONS,
    ):
        super().__init__(options=options)
        self.path, self.patterns, self.section = path, patterns, section

    def corpus(self) -> Corpus:
        return corpora.TextFiles(self.path, patterns=self.patterns, section=self.section, policy=self.options.policy)


class TextRows(TextData):
    """Base of text in tables, of which a field holds a document's text.

    Args:
        path: a file, or a folder that is searched through.
        field: that holds the text.
        options: what all text data sets take.
    """

    _reader: type[corpora.Rows]

    def __init__(
        self,
        *,
        path: str,
        field: str = "text",
        options: TextOptions = OPTIONS,
    ):
        super().__init__(options=options)
        self.path, self.field = path, field

    def corpus(self) -> Corpus:
        return self._reader(self.path, field=self.field, policy=self.options.policy)


class JsonLines(TextRows):
    """JSON lines, each object a document: .jsonl, .jsonl.gz or .ndjson files."""

    _reader = corpora.JsonLines


class Parquet(TextRows):
    """Rows of parquet files, as `datasets` writes them, `field` being the column; needs pyarrow."""

    _reader = corpora.Parquet


class Shards(TextRows):
    """webdataset shards: tar files with .txt members, or .json ones with the text in `field`."""

    _reader = corpora.Shards


class ChatLines(TextData):
    """Conversations as JSON lines, written by the tokenizer's chat template; each fills rows of its own.

    Args:
        path: a .jsonl file (or .jsonl.gz, .ndjson), or a folder of them.
        field: that holds the messages, each with role and content.
        answers_only: whether only what the assistant wrote is scored.
        options: what all text data sets take but `boundaries`.
    """

    defaults = replace(TextData.defaults, boundaries="padded")
    fixed: ClassVar[dict[str, str]] = {"boundaries": "each conversation has rows of its own"}
    _special = TURN

    def __init__(
        self,
        *,
        path: str,
        field: str = "messages",
        answers_only: bool = True,
        options: TextOptions = OPTIONS,
    ):
        super().__init__(options=options)
        self.path, self.field, self._answers_only = path, field, answers_only

    def corpus(self) -> Corpus:
        return corpora.JsonLines(self.path, field=self.field, chat=True, policy=self.options.policy)
