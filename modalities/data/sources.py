"""Where media with labels lie: folders of files by class, tables of files, tar shards."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ...errors import ConfigError
from ...utils.log import logger_of

logger = logger_of(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".3gp", ".asf", ".flv", ".vob"}
    | {".h264", ".hevc", ".m1v", ".m2v"}  # bare streams
)
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff"})

_LAYOUTS = "{split}/CLASS/FILES, {split}.csv, or tar shards {split}-*.tar or {split}/*.tar"
# Folders of these names are splits and no classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
# What readers call media that come as bytes, since they do not know where these are from.
UNNAMED = "(bytes)"
# A label beyond this is a column of something else, and not the number of a class.
_MOST_CLASSES = 1_000_000


@runtime_checkable
class Source(Protocol):
    """Labelled media by index. Picklable; what it has to open it opens in the process that reads."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the sample lies, another one for every sample."""
        ...

    def label(self, index: int) -> int:
        """The index of its class."""
        ...

    def media(self, index: int) -> Path | bytes:
        """The path of its file, or the bytes of a shard's member.

        Raises:
            MediaError: the shard cannot be read.
        """
        ...


class Strings(Sequence[str]):
    """Many strings in two blocks of memory.

    A list of a million strings costs minutes where a worker is spawned, and a forked worker copies it page by page,
    since reading an object writes its reference count.
    """

    def __init__(self, strings: Iterable[str]):
        data, ends = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data, self._ends = bytes(data), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        index %= len(self)
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class FileSource:
    """Files with labels."""

    def __init__(self, files: Iterable[tuple[str, int]], classes: tuple[str, ...]):
        files = list(files)
        self.classes = classes
        self._paths = Strings(path for path, _ in files)
        self._labels = array("q", [label for _, label in files])

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return self._paths[index]

    def label(self, index: int) -> int:
        return self._labels[index]

    def media(self, index: int) -> Path:
        return Path(self._paths[index])


class FolderSource(FileSource):
    """Files in one folder a class, in alphabetical order; folders inside these are searched through.

    Args:
        folder: with a folder for every class.
        suffixes: of the files that count, lower case; hidden ones do not.
        classes: by index; None takes the names of the folders.

    Raises:
        ConfigError: no such folder, no class, no file, or folders that `classes` does not know.
    """

    def __init__(self, folder: str | Path, suffixes: Collection[str], classes: Sequence[str] | None = None):
        folder = Path(folder)
        found = sorted(e.name for e in _visible(folder) if os.path.isdir(e.path)) if folder.is_dir() else []
        if not found:
            raise ConfigError(f"{str(folder)!r} holds no folders; it needs one for each class, with its files")
        files = {name: walk_files(folder / name, suffixes) for name in found}
        if not any(files.values()):
            raise ConfigError(f"no file below {str(folder)!r} ends in {', '.join(sorted(suffixes))}")
        # An empty folder makes a class where classes are found, and is no error where they are given.
        known = tuple(found if classes is None else classes)
        labels = label_of([name for name in found if files[name]], known, str(folder), numbers=False)
        super().__init__(((str(path), labels[name]) for name in found for path in files[name]), known)


def find_source(
    root: str | Path, split: str, suffixes: Collection[str], classes: Sequence[str] | None = None
) -> Source:
    """The source of one split, from the layout that is there.

    Args:
        root: holds `split.csv`, tar shards `split-*.tar` or `split/*.tar`, or `split/CLASS/FILES`; of several the first
            in this order is taken, as tables and shards say more than folders.
        split: "train", "val", ...
        suffixes: of the media files, such as IMAGE_SUFFIXES.
        classes: by index, where the split has to fit them; None takes the split's own.

    Raises:
        ConfigError: no such folder, none of the layouts, or it holds nothing that fits.
        MediaError: a shard that cannot be read.
    """
    root = Path(root)
    check_folder(root)
    if (root / f"{split}.csv").is_file():
        from .tables import CSVSource

        return CSVSource(root / f"{split}.csv", suffixes, classes)
    shards = find_shards(root, split)
    if shards:
        from .shards import ShardSource

        return ShardSource(shards, suffixes, classes)
    if not (root / split).is_dir():
        packed = any(p.name.endswith((".tar.gz", ".tgz")) for p in root.glob(f"{split}-*"))
        raise ConfigError(
            f"{str(root)!r} has no split {split!r}; it needs {_LAYOUTS.format(split=split)}"
            + ("; compressed shards have to be unpacked (gunzip)" if packed else "")
        )
    try:
        return FolderSource(root / split, suffixes, classes)
    except ConfigError as error:
        raise ConfigError(f"{error}; the layouts are {_LAYOUTS.format(split=split)}, in {str(root)!r}") from error


def find_splits(root: str | Path, suffixes: Collection[str]) -> dict[str, Source]:
    """The sources "train" and "val" of a root, and "test" where it has one; their classes are the training ones.

    "val" may be called "valid" or "validation". Where there is none, a fifth of the training files of each class is
    held out, always the same; and where there is no "train" either, the folders in the root are the classes.

    Raises:
        ConfigError: as `find_source`, or there is one class only, or too few files to hold one out.
        MediaError: as `find_source`.
    """
    root = Path(root)
    check_folder(root)
    folders = {entry.name.lower() for entry in _visible(root) if os.path.isdir(entry.path)}
    if has_split(root, "train") or not folders or folders & _SPLITS:
        where, train = root / "train", find_source(root, "train", suffixes)
    else:
        where, train = root, FolderSource(root, suffixes)
    check_classes(train.classes, where)
    named = next((name for name in ("val", "valid", "validation") if where != root and has_split(root, name)), None)
    splits: dict[str, Source] = {}
    if named is None and isinstance(train, FileSource):
        splits["train"], splits["val"] = hold_out(train, root)
    else:
        splits["train"], splits["val"] = train, find_source(root, named or "val", suffixes, train.classes)
    if where != root and has_split(root, "test"):
        splits["test"] = find_source(root, "test", suffixes, train.classes)
    return splits


@cache
def _say_split(root: str, held_out: int, files: int) -> None:
    """Say it once, however often a folder is looked at."""
    logger.info("%s has no split 'val': %s of its %s files are held out, a fifth of each class", root, held_out, files)


def hold_out(source: FileSource, root: Path, fraction: float = 0.2) -> tuple[FileSource, FileSource]:
    """The files to train on and to hold out: the same fraction of each class, which ones follows from their names.

    Args:
        root: names are taken from here, so that a folder that is moved keeps its split.

    Raises:
        ConfigError: no class has two files.
    """
    members: dict[int, list[tuple[bytes, str]]] = {}
    for i in range(len(source)):
        name = source.name(i)
        key = Path(os.path.relpath(name, root)).as_posix().encode("utf-8", "surrogateescape")
        members.setdefault(source.label(i), []).append((hashlib.sha256(key).digest(), name))
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, files in members.items():
        count = 0 if len(files) < 2 else max(1, round(fraction * len(files)))
        held = {name for _, name in sorted(files)[:count]}
        for _, name in files:
            sides[name in held].append((name, label))
    train, held_out = (FileSource(sorted(side), source.classes) for side in sides)
    if not len(held_out):
        raise ConfigError(
            f"no class in {str(root)!r} has two files, so that none can be held out; add files, or a split 'val'"
        )
    _say_split(str(root), len(held_out), len(source))
    return train, held_out


def check_folder(root: Path) -> None:
    """See to it that a folder is there.

    Raises:
        ConfigError: it is not. The message has its whole path: a relative one, which a run's configuration keeps, means
            another folder when the run is resumed from elsewhere.
    """
    if not root.is_dir():
        whole = "" if root.is_absolute() else f"; from the present folder it would be {os.path.abspath(root)!r}"
        raise ConfigError(f"folder {str(root)!r} does not exist{whole}")


def check_classes(classes: Sequence[str], where: Path) -> None:
    """See to it that there is something to tell apart.

    Raises:
        ConfigError: there is one class only.
    """
    if len(classes) == 1:
        raise ConfigError(f"{str(where)!r} has one class, {classes[0]!r}; a classifier needs at least two")


def has_split(root: str | Path, split: str) -> bool:
    """Whether `find_source` would find a layout for the split."""
    root = Path(root)
    return (root / split).is_dir() or (root / f"{split}.csv").is_file() or bool(find_shards(root, split))


def find_shards(root: Path, split: str) -> list[Path]:
    """The tar files of a split, in alphabetical order."""
    inside = root / split
    found = [e.path for e in _visible(root) if e.name.startswith(f"{split}-")] if root.is_dir() else []
    found = found or ([e.path for e in _visible(inside)] if inside.is_dir() else [])
    return [Path(path) for path in sorted(found) if path.endswith(".tar") and os.path.isfile(path)]


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """The class names in `classes.json` (a list) or `classes.txt` (a line each) of a folder, by index.

    Raises:
        ConfigError: the file holds anything else.
    """
    for name in ("classes.json", "classes.txt"):
        file = folder / name
        if not file.is_file():
            continue
        text = read_utf8(file)
        try:
            names = json.loads(text) if name.endswith("json") else text.splitlines()
        except ValueError as error:
            raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"{str(file)!r} must hold the names of the classes, in their order")
        if len(set(names)) < len(names):
            raise ConfigError(f"{str(file)!r} names a class twice")
        return tuple(names)
    return None


def read_utf8(file: Path) -> str:
    """The text of a file, without the mark that some editors put in front.

    Raises:
        ConfigError: it is in another encoding.
    """
    data = file.read_bytes()
    if b"\0" in data:
        raise ConfigError(f"{str(file)!r} is no text in UTF-8 (perhaps in UTF-16); save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{str(file)!r} is no text in UTF-8 (it has a byte {byte:#x}); save it as UTF-8") from error


def label_of(
    found: Iterable[str | int], classes: Sequence[str], where: str, *, numbers: bool = True
) -> dict[str | int, int]:
    """The index of the class for each label that occurs: an index, the name of a class or, with `numbers`, its number.

    Raises:
        ConfigError: labels that are neither, by name.
    """
    known = {name: index for index, name in enumerate(classes)}
    labels = {
        label: label if isinstance(label, int) else known.get(label, as_index(label) if numbers else None)
        for label in found
    }
    unknown = sorted(str(label) for label, i in labels.items() if i is None or not 0 <= i < len(classes))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        names = ", ".join([*classes[:8], *(["..."] if len(classes) > 8 else [])])
        raise ConfigError(
            f"{where} has the classes {', '.join(unknown[:5])}{more}, which are none of the {len(classes)} known ones "
            f"({names})"
        )
    return labels  # type: ignore[return-value]


def name_classes(labels: set[str | int], where: str, described: Mapping[int, str] = {}) -> list[str]:
    """Names for all classes, from the labels that occur: the names among them, or numbers up to the largest.

    Args:
        described: names that are known for some of the numbers.

    Raises:
        ConfigError: labels of both kinds, a number that is none of a class, or two numbers of one name.
    """
    indices = [label if isinstance(label, int) else as_index(label) for label in labels]
    if None in indices:
        if not all(isinstance(label, str) for label in labels):
            raise ConfigError(f"{where} mixes labels that are indices and labels that are names; use one kind")
        return sorted(labels)  # type: ignore[type-var]
    top = max(indices)  # type: ignore[type-var]
    if top >= _MOST_CLASSES:
        raise ConfigError(f"{where} has the label {top}; a label is the name of a class or its index")
    names = [described.get(index, str(index)) for index in range(top + 1)]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where} gives one name to two classes, of {', '.join(names[:8])}")
    return names


def as_index(text: str) -> int | None:
    """The number that a label is, if it is one."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 16 else None


def walk_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files below a folder that end in one of `suffixes`, in alphabetical order, without hidden ones.

    Links to folders are followed, as data sets often consist of them, but never in a circle. A link of a file that
    leads nowhere counts: its file is an unreadable one.

    Raises:
        ConfigError: a folder that cannot be looked into.
    """
    try:
        return [Path(path) for path in sorted(_walk(folder, suffixes, ()))]
    except OSError as error:
        raise ConfigError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error


def _walk(folder: Path, suffixes: Collection[str], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    stat = os.stat(folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    for entry in _visible(folder):
        # Unlike those of `entry`, these answer for links in a circle too.
        if os.path.isdir(entry.path):
            yield from _walk(Path(entry.path), suffixes, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in suffixes and (entry.is_symlink() or entry.is_file()):
            yield entry.path


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
