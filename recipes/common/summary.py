"""What a data set of files holds, looked at before anything is trained: classes, samples, duplicates."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import MediaError
from ...modalities.data.sources import FileSource, Source

# Samples of a split that are compared by their content: files, of which most are told apart by their size, and
# members of shards, which have to be read.
_FILES, _MEMBERS = 20_000, 2_000
# A largest class with more than so many times the samples of the smallest is worth a warning.
_UNEVEN = 5


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Classes and samples of a data set.

    Args:
        classes: their number.
        samples: by split.
        smallest: the class with the fewest training samples, and how many it has.
        largest: the class with the most.
        empty: classes without a training sample.
        duplicates: pairs of one content, a training sample and one held out, by name.
    """

    classes: int
    samples: Mapping[str, int]
    smallest: tuple[str, int] = ("", 0)
    largest: tuple[str, int] = ("", 0)
    empty: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def lines(self) -> list[str]:
        """What is worth saying, warnings last."""
        splits = ", ".join(f"{count:,} {split}" for split, count in self.samples.items())
        first = f"data: {self.classes} classes, samples: {splits}"
        if self.smallest[0]:
            first += f"; by class {self.smallest[1]} ({self.smallest[0]}) to {self.largest[1]} ({self.largest[0]})"
        return [first, *(f"warning: {text}" for text in self.warnings())]

    def warnings(self) -> list[str]:
        found = []
        if self.empty:
            found.append(f"{len(self.empty)} classes have no training sample: {', '.join(self.empty[:5])}")
        if self.largest[1] > _UNEVEN * max(1, self.smallest[1]):
            found.append(
                f"class {self.largest[0]!r} has {self.largest[1]} training samples and {self.smallest[0]!r} "
                f"{self.smallest[1]}: accuracy says little about the small ones"
            )
        if self.duplicates:
            train, held = self.duplicates[0]
            found.append(
                f"{len(self.duplicates)} held-out samples are training samples too, such as {held} ({train}): "
                "the accuracy on them is too high"
            )
        return found


def summarise(sources: Mapping[str, Source]) -> DataSummary:
    """The summary of labelled sources by split, of which "train" is one."""
    train = sources["train"]
    counts = Counter(train.label(index) for index in range(len(train)))
    order = sorted(counts, key=lambda label: (counts[label], label))
    named = [(train.classes[label], counts[label]) for label in order]
    return DataSummary(
        classes=len(train.classes),
        samples={split: len(source) for split, source in sources.items()},
        smallest=named[0] if named else ("", 0),
        largest=named[-1] if named else ("", 0),
        empty=tuple(name for label, name in enumerate(train.classes) if label not in counts),
        duplicates=tuple(_duplicates(train, [source for split, source in sources.items() if split != "train"])),
    )


def _duplicates(train: Source, rest: list[Source]) -> list[tuple[str, str]]:
    """Pairs of samples with the same bytes. Only files of equal sizes are read."""
    known: dict[int, list[int]] = {}
    for index in range(_compared(train)):
        if (size := _size(train, index)) is not None:
            known.setdefault(size, []).append(index)
    hashes: dict[int, bytes | None] = {}
    found = []
    for source in rest:
        for index in range(_compared(source)):
            same = known.get(_size(source, index) or -1, [])
            content = _hash(source, index) if same else None
            for other in same:
                if other not in hashes:
                    hashes[other] = _hash(train, other)
                if content is not None and hashes[other] == content:
                    found.append((train.name(other), source.name(index)))
                    break
    return found


def _compared(source: Source) -> int:
    return min(len(source), _FILES if isinstance(source, FileSource) else _MEMBERS)


def _size(source: Source, index: int) -> int | None:
    try:
        media = source.media(index)
        return len(media) if isinstance(media, bytes) else os.stat(media).st_size
    except (OSError, MediaError):
        return None  # whoever reads the file says what is wrong with it


def _hash(source: Source, index: int) -> bytes | None:
    try:
        media = source.media(index)
        data = media if isinstance(media, bytes) else Path(media).read_bytes()
    except (OSError, MediaError):
        return None
    return hashlib.blake2b(data, digest_size=16).digest()
