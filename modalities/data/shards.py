"""Labelled media in tar shards of webdataset's layout, read at any place through an index."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ...errors import ConfigError, MediaError
from ...utils.console import write_atomically
from .sources import Strings, as_index, label_of, name_classes, read_classes
from .tar import LIMIT, Member, Stamp, TarIndex, opened, read_member

INDEX_SUFFIX = ".index.json"
_VERSION = 1
# webdataset's own notes: members and folders with such names are no samples.
_NOTE = re.compile(r"__[^/]*__($|/)")
# A class is a number or a name, and what is said about a sample is a page at most.
_LONGEST = {"cls": 1 << 10, "json": 1 << 20}


class _Sample(NamedTuple):
    member: Member
    # The index of its class, or its name.
    label: int | str
    # Why it cannot be used, if it cannot.
    problem: str | None = None


class _Refused(MediaError):
    """A member that says nothing which can be a label."""


class ShardSource:
    """Media in tar shards as webdataset and `omnimix data shard` write them.

    A sample is the members of one key: `key.jpg` with a suffix that counts, `key.cls` with the index of its class (or
    its name), or `key.json` with the name as "class". As in webdataset a key ends at the first dot, and what follows
    may itself have dots: `Track 2.0 (x).wav` is of the key `Track 2`. Each of several such media with a label of its
    own (`Track 2.0 (x).cls`) is a sample.

    A `SHARD.index.json` next to a shard, which `omnimix data shard` leaves, saves the pass over its headers; it is used
    only if it fits, and each read checks it.

    A sample without a label, with one that is no name or index, or one of several media for a single label, counts as
    a file that cannot be read: it has its place, `media` raises, and `problems` names it.

    Args:
        shards: the tar files; samples come in their order.
        suffixes: of the media, lower case, with their dots.
        classes: by index; None takes those of `classes.json` or `classes.txt` next to the shards or a folder above,
            those that the .json members name, or the numbers up to the largest.
        limit: bytes of a member at most.

    Raises:
        ConfigError: no shards, no media with these suffixes, none that can be used, or labels that `classes` does not
            know.
        MediaError: a shard that is cut short, corrupt, compressed or hostile; see `modalities.tar.scan`.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        suffixes: Collection[str],
        classes: Sequence[str] | None = None,
        *,
        limit: int = LIMIT,
    ):
        if not shards:
            raise ConfigError("shards are none; name at least one tar file")
        folder = Path(shards[0]).parent
        if classes is None:
            classes = read_classes(folder) or read_classes(folder.parent)
        self._shards = Strings(str(shard) for shard in shards)
        self._stamps: list[Stamp] = []
        self._shard, self._offsets, self._sizes = array("l"), array("q"), array("q")
        names: list[str] = []
        found_labels: list[int | str] = []
        described: dict[int, str] = {}
        self._problems: dict[int, str] = {}
        for number, shard in enumerate(self._shards):
            found = None if classes is None else read_index(shard, suffixes, limit)
            if found is None:
                stamp, samples = _read_shard(shard, suffixes, limit, described if classes is None else None)
            else:
                stamp, samples = found
            self._stamps.append(stamp)
            for (name, offset, size), label, problem in samples:
                if problem is not None:
                    self._problems[len(names)] = problem
                names.append(name)
                found_labels.append(label)
                self._shard.append(number)
                self._offsets.append(offset)
                self._sizes.append(size)
        used = {label for index, label in enumerate(found_labels) if index not in self._problems}
        if not used:
            _refuse(len(shards), folder, suffixes, self._problems)
        if classes is None:
            classes = name_classes(used, str(folder), described)
        labels = label_of(used, classes, str(folder), numbers=False)
        self.classes = tuple(classes)
        self._names = Strings(names)
        self._labels = array("q", [labels.get(label, -1) for label in found_labels])

    @property
    def problems(self) -> dict[str, str]:
        """The samples that cannot be used, by name, with the reason."""
        return {self.name(index): reason for index, reason in self._problems.items()}

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"{self._shards[self._shard[index]]}/{self._names[index]}"

    def label(self, index: int) -> int:
        """The index of its class; -1 for a sample that `media` refuses."""
        return -1 if index in self._problems else self._labels[index]

    def media(self, index: int) -> bytes:
        if index in self._problems:
            raise MediaError(self._problems[index])
        shard = self._shard[index]
        member = Member(self._names[index], self._offsets[index], self._sizes[index])
        return read_member(self._shards[shard], member, self._stamps[shard])


def split_key(name: str) -> tuple[str, str] | None:
    """A member's key and its suffix, lower case without the first dot; None for what is no part of a sample.

    A key ends at the first dot of the file's name, and folders belong to it (webdataset.tariterators). Hidden files,
    which systems leave in archives, have none.
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start or ("__" in name and _NOTE.search(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _refuse(shards: int, folder: Path, suffixes: Collection[str], problems: dict[int, str]) -> NoReturn:
    """Raise for shards that have no sample that can be used."""
    if not problems:
        raise ConfigError(f"no member of the {shards} shards in {str(folder)!r} ends in {', '.join(sorted(suffixes))}")
    raise ConfigError(
        f"none of the {len(problems)} samples in the {shards} shards of {str(folder)!r} can be used; the first: "
        f"{next(iter(problems.values()))}"
    )


def _read_shard(
    shard: str, suffixes: Collection[str], limit: int, described: dict[int, str] | None
) -> tuple[Stamp, list[_Sample]]:
    """The samples of a shard from its headers.

    Args:
        described: takes the class name that a .json member gives to a label of a .cls member, for one of each.
    """
    index = TarIndex(shard, limit=limit)
    groups: dict[str, list[tuple[str, int]]] = {}
    for number, name in enumerate(index.names):
        if (parts := split_key(name)) is not None:
            groups.setdefault(parts[0], []).append((parts[1], number))
    samples: list[_Sample] = []
    for key, members in groups.items():
        samples += _samples(index, key, members, suffixes, described)
    return index.stamp, samples


def _samples(
    index: TarIndex,
    key: str,
    members: list[tuple[str, int]],
    suffixes: Collection[str],
    described: dict[int, str] | None,
) -> Iterator[_Sample]:
    """The samples among the members of one key: those with a label of their own, or else the one of the key's label."""
    parts: dict[str, dict[str, list[int]]] = {}
    for suffix, number in members:
        stem, _, kind = suffix.rpartition(".")
        parts.setdefault(stem, {}).setdefault(kind, []).append(number)
    media = {stem: [n for kind, ns in p.items() if f".{kind}" in suffixes for n in ns] for stem, p in parts.items()}
    media = {stem: numbers for stem, numbers in media.items() if numbers}
    labelled = {stem for stem in media if not parts[stem].keys().isdisjoint(_LONGEST)}
    # Next to `key.jpg`, media without a label of their own are further columns of its sample, such as a mask.
    own = [(media[s], parts[s]) for s in media if not s or s in labelled or (labelled and "" not in media)]
    for numbers, about in own or [([n for ns in media.values() for n in ns], parts.get("", {}))]:
        for number in numbers:
            try:
                if len(numbers) > 1:
                    names = " and ".join(repr(index.names[number]) for number in numbers[:2])
                    raise _Refused(f"the sample {key!r} of the shard {index.path!r} has two media, {names}")
                label = _label(index, key, about, described)
            except _Refused as problem:
                yield _Sample(index[number], "", str(problem))
            else:
                yield _Sample(index[number], label)


def _label(index: TarIndex, key: str, members: dict[str, list[int]], described: dict[int, str] | None) -> int | str:
    """The label among the members of a sample.

    Raises:
        _Refused: there is none, two, or one that can be neither the index nor the name of a class.
    """
    for kind in _LONGEST:
        if len(members.get(kind, ())) > 1:
            names = " and ".join(repr(index.names[number]) for number in members[kind][:2])
            raise _Refused(f"the sample {key!r} of the shard {index.path!r} has two of {kind!r}, {names}")
    named = None if "json" not in members else members["json"][0]
    text = "" if "cls" not in members else _text(index, members["cls"][0])
    label = as_index(text) if text else None if named is None else _named(index, named)
    if label is None and not text:
        raise _Refused(
            f"the sample {key!r} of the shard {index.path!r} has no label; it needs a member {key}.cls with the index "
            f"of its class, or {key}.json with its name as 'class'"
        )
    if described is not None and isinstance(label, int) and label not in described and named is not None:
        name = _named(index, named)
        if name is not None:
            described[label] = name
    return text if label is None else label


def _text(index: TarIndex, number: int) -> str:
    """What a .cls member says: an index, or what can be the name of a class."""
    data = _small(index, number, "cls")
    try:
        return _checked(index, number, data.decode().strip())
    except UnicodeDecodeError:
        return _checked(index, number, repr(data), possible=False)


def _checked(index: TarIndex, number: int, text: str, possible: bool = True) -> str:
    """The text, if it can be the index or the name of a class: no control characters, and no other number."""
    if possible and text.isprintable() and (as_index(text) is not None or not re.fullmatch(r"[-+]?\d+", text)):
        return text
    raise _Refused(
        f"the member {index.names[number]!r} of the shard {index.path!r} holds {text[:40]!r}, which is neither the "
        "index nor the name of a class"
    )


def _small(index: TarIndex, number: int, kind: str) -> bytes:
    member = index[number]
    if member.size > _LONGEST[kind]:
        raise _Refused(f"the member {member.name!r} of the shard {index.path!r} has {member.size:,} bytes, no {kind}")
    return index.read(number)


def _named(index: TarIndex, number: int) -> str | None:
    """The class that a .json member names."""
    try:
        content = json.loads(_small(index, number, "json"))
    except (ValueError, RecursionError) as error:
        name = index.names[number]
        raise _Refused(f"the member {name!r} of the shard {index.path!r} is not JSON: {error}") from error
    name = content.get("class") if isinstance(content, dict) else None
    return _checked(index, number, name) if isinstance(name, str) and name else None


def write_index(shard: Path, samples: Iterable[tuple[Member, int]]) -> None:
    """Write `SHARD.index.json` next to a whole shard: the media members of its samples and their labels."""
    rows = list(samples)
    content = {
        "version": _VERSION,
        **Stamp.of(shard)._asdict(),
        "ends": _ends(shard),
        "names": [member.name for member, _ in rows],
        "offsets": [member.offset for member, _ in rows],
        "sizes": [member.size for member, _ in rows],
        "labels": [label for _, label in rows],
    }
    write_atomically(f"{shard}{INDEX_SUFFIX}", json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_index(shard: str, suffixes: Collection[str], limit: int) -> tuple[Stamp, list[_Sample]] | None:
    """What the index of a shard says, or None where there is none that fits the shard.

    Raises:
        MediaError: there is no such shard.
    """
    file = Path(f"{shard}{INDEX_SUFFIX}")
    with opened(shard) as archive:
        stamp = Stamp.of(archive.fileno())
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != _VERSION or content["size"] != stamp.size:
            return None
        # A copy of the shard has another time.
        if content["mtime_ns"] != stamp.mtime_ns and content["ends"] != _ends(Path(shard)):
            return None
        samples = list(_rows(content, suffixes, stamp.size, limit))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stamp, samples


def _rows(content: dict[str, Any], suffixes: Collection[str], size: int, limit: int) -> Iterator[_Sample]:
    columns = (content[name] for name in ("names", "offsets", "sizes", "labels"))
    for name, offset, length, label in zip(*columns, strict=True):
        if not (type(name) is str and type(label) in (int, str) and type(offset) is type(length) is int):
            raise TypeError("a column holds values of another type")
        if not (512 <= offset <= offset + length <= size and length <= limit):
            raise ValueError("a member lies outside its shard")
        if (parts := split_key(name)) is not None and f".{parts[1]}" in suffixes:
            yield _Sample(Member(name, offset, length), label)


def _ends(shard: Path) -> str:
    """A digest of a file's first and last 64 KiB."""
    with shard.open("rb") as file:
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return digest.hexdigest()
