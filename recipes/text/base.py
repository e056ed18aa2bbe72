"""What all text data of the recipes share: a tokenizer, a cache of tokens, what is held out, loaders."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ...backbones.config import bounded
from ...errors import ConfigError
from ...modalities.data.corpus import Corpus, split_fraction
from ...modalities.data.sources import walk_files
from ...modalities.data.token_cache import TokenCache, cached_bpe, cached_tokens
from ...modalities.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from ...utils.log import logger_of
from ...utils.renamed import renamed_options
from ..common.loading import EpochLoader
from ..common.options import DataOptions, Reader, RecipeData, at_least
from .windows import PackedWindows, Pieces


@renamed_options(borders="boundaries", val_part="val_fraction", vocabulary="vocab_size")
@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """What all text data sets take; see `DataOptions` for the rest. The tokens lie in memory: 0 workers are fastest.

    Args:
        tokenizer: "bpe" learns one from the text that is not held out; "bytes"; or where one lies: a folder or a
            tokenizer.json.
        vocab_size: size of a tokenizer that is trained.
        length: tokens of a sequence that are scored; one more is given.
        boundaries: "packed" runs through all documents, with sequence boundaries between them; "padded" fills rows up,
            of which each holds a document or a piece of one.
        val_fraction: the fraction of all documents that is held out, by a hash of their names.
        val_batch_size: sequences of a batch that is validated; null is twice `batch_size`.
        val_tokens: about how many held-out tokens each validation during a fit takes, always the same; null takes all,
            as the measurement at the end does.
        end: name of the token that ends documents, for a tokenizer that is loaded and has none of the usual ones.
        cache: folder of tokens and tokenizers; null is the user's cache.
    """

    tokenizer: str | None = None
    vocab_size: int | None = None
    length: int | None = None
    boundaries: Literal["packed", "padded"] | None = None
    val_fraction: float | None = None
    val_batch_size: int | None = None
    val_tokens: int | None = None
    end: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "length", "vocab_size", "val_batch_size", "val_tokens")
        bounded(self, "val_fraction", above=0, below=1, wanted="between 0 and 1")


logger = logger_of(__name__)
# Leaves every option to the data set.
OPTIONS = TextOptions()


# What reads files, by their endings.
_READERS = (
    *(("TextFiles", suffix) for suffix in (".txt", ".md")),
    *(("JsonLines", suffix) for suffix in (".jsonl", ".ndjson", ".jsonl.gz")),
    ("Parquet", ".parquet"),
    ("Shards", ".tar"),
)


def _has_messages(file: Path) -> bool:
    """Whether the rows of a file of JSON lines are conversations."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as rows:
            row = json.loads(rows.readline(1 << 24))
    except (OSError, ValueError, EOFError, zlib.error):
        return False  # its reader says what is wrong
    return isinstance(row, dict) and "messages" in row


class TextData(RecipeData):
    """Base of the text data sets. A batch is a dict: tokens (b, t), perhaps cu_seqlens, lengths, counted; and bytes.

    A batch follows from (seed, epoch, number of the batch) alone.

    Args:
        options: those that all of them share; those that are None have the `defaults` of the class.
    """

    defaults: ClassVar[TextOptions] = TextOptions(
        batch_size=16,
        workers=0,
        seed=0,
        policy="skip",
        tokenizer="bpe",
        vocab_size=4096,
        length=256,
        boundaries="packed",
        val_fraction=0.05,
    )
    # Special tokens, except the end token, that the documents need.
    _special: tuple[str, ...] = ()
    # Whether of conversations only the answers are scored.
    _answers_only = False

    def __init__(self, *, options: TextOptions = OPTIONS):
        super().__init__()
        # Options, of which those that have a default are not None any more: their types do not say that.
        self.options: Any = self.filled(options)

    @classmethod
    def reader_of(cls, path: Path) -> Reader:
        sizes: dict[str, int] = {}
        first: dict[str, Path] = {}
        suffixes = sorted({suffix for _, suffix in _READERS})
        for file in [path] if path.is_file() else walk_files(path, {*suffixes, ".gz"}):
            kind = next((kind for kind, suffix in _READERS if file.name.lower().endswith(suffix)), None)
            if kind is not None and file.is_file():
                sizes[kind] = sizes.get(kind, 0) + file.stat().st_size
                first.setdefault(kind, file)
        if not sizes:
            raise ConfigError(
                f"data is {str(path)!r}, where nothing ends in {', '.join(suffixes)}; name a data set and its options, "
                "for example --data TextFiles --data.path DIR --data.patterns '[\"*.log\"]'"
            )
        kind = max(sizes, key=lambda kind: sizes[kind])
        if kind == "JsonLines" and _has_messages(first[kind]):
            kind = "ChatLines"
        # Long files are cut, so that there is something to hold out.
        return Reader(kind, {"path": path} | ({"section": 20_000} if kind == "TextFiles" else {}))

    @abstractmethod
    def corpus(self) -> Corpus:
        """Where the documents come from."""

    @cached_property
    def _corpus(self) -> Corpus:
        return self.corpus()

    @cached_property
    def val_fraction(self) -> float:
        """The fraction of the documents that is held out: the one asked for, unless that leaves one side empty."""
        try:
            found = split_fraction(self._corpus, wanted := self.options.val_fraction)
        except ConfigError as error:
            raise ConfigError(f"{error}{self._more_documents}") from error
        if found != wanted:
            side = "held out" if found > wanted else "trained on"
            logger.warning(
                "there are so few documents that val_fraction %g leaves one side empty: one is %s", wanted, side
            )
        return found

    @property
    def _cache_folder(self) -> Path | None:
        return None if self.options.cache is None else Path(self.options.cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained now where it has to be."""
        if self.options.tokenizer == "bytes":
            return ByteTokenizer(self._special)
        if self.options.tokenizer != "bpe":
            return load_tokenizer(self.options.tokenizer, end=self.options.end)
        return cached_bpe(
            self._corpus,
            self.options.vocab_size,
            val_fraction=self.val_fraction,
            special=self._special,
            folder=self._cache_folder,
        )

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.tokenizer.vocab_size

    @cached_property
    def cache(self) -> TokenCache:
        """The tokens of all documents, encoded now where they have to be."""
        return cached_tokens(self._corpus, self.tokenizer, folder=self._cache_folder, answers_only=self._answers_only)

    @property
    def unreadable(self) -> dict[str, str]:
        """The documents that were left out, by name, with the reason."""
        return dict(self.cache.problems)

    def prepare_data(self) -> None:
        # One process of a machine encodes, and the others find its work.
        _ = self.cache

    def _documents(self, *, held_out: bool) -> np.ndarray:
        """Indices of the documents of one side of the split."""
        return np.flatnonzero(self.cache.held_out(self.val_fraction) == held_out)

    # What could give more documents, for the message above.
    _more_documents = ""

    @cached_property
    def train_set(self) -> PackedWindows | Pieces:
        documents = self._documents(held_out=False)
        if self.options.boundaries == "packed":
            return PackedWindows(self.cache, documents, self.options.length, seed=self.options.seed)
        return Pieces(self.cache, documents, self.options.length, fill=self.tokenizer.end)

    def _held_out(self, limit: int | None) -> Pieces:
        documents = self._documents(held_out=True)
        return Pieces(self.cache, documents, self.options.length, fill=self.tokenizer.end, limit=limit, sort=True)

    @cached_property
    def val_set(self) -> Pieces:
        return self._held_out(self.options.val_tokens)

    @cached_property
    def test_set(self) -> Pieces:
        return self._held_out(None)

    def setup(self, stage: str) -> None:
        _ = self.val_set if stage == "fit" else self.test_set

    @property
    def _held_out_batch(self) -> int:
        return self.options.val_batch_size or 2 * self.options.batch_size

    def _loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> EpochLoader:
        if self.options.workers:
            # Workers encode nothing; without this the tokenizers library warns of each that is started.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return EpochLoader(
            dataset,
            batch_size=batch_size,
            seed=self.options.seed,
            shuffle=shuffle,
            workers=self.options.workers,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
        )

    def train_dataloader(self) -> EpochLoader:
        return self._loader(self.train_set, self.options.batch_size, shuffle=self.shuffled)

    def val_dataloader(self) -> EpochLoader:
        """The held-out text; during a fit as much of it as `val_tokens` says."""
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        return self._loader(self.val_set if fitting else self.test_set, self._held_out_batch, shuffle=False)

    def test_dataloader(self) -> EpochLoader:
        """All held-out text, whatever `val_tokens` says."""
        return self._loader(self.test_set, self._held_out_batch, shuffle=False)
