"""`omnimix data shard`: labelled files into tar shards of webdataset's layout, whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ConfigError, MediaError
from ..modalities.data.shards import INDEX_SUFFIX, split_key, write_index
from ..modalities.data.sources import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Source,
    check_folder,
    find_source,
    has_split,
)
from ..modalities.data.tar import TarIndex
from ..utils.console import emit, markup, say, write_atomically
from ..utils.files import hidden_folder
from ..utils.options import add_json

KINDS = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}
SPLITS = ("train", "val", "test")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_OURS = re.compile(rf".+-\d{{6,}}\.tar({re.escape(INDEX_SUFFIX)})?|classes\.json")


@dataclass(kw_only=True)
class Written:
    """What became of one split.

    Args:
        split: its name.
        shards: their paths, in order.
        samples: how many were written.
        nbytes: of the shards.
        problems: what was left out, by name, with the reason.
    """

    split: str
    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    nbytes: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def shard_folder(
    root: str | Path,
    out: str | Path,
    *,
    kind: str,
    splits: tuple[str, ...] | None = None,
    samples: int = 10_000,
    nbytes: int = 256 << 20,
    seed: int | None = 0,
    policy: Literal["skip", "raise"] = "skip",
    overwrite: bool = False,
    seen: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> list[Written]:
    """Write `out/SPLIT-000000.tar`, ..., an index for each, and `out/classes.json`.

    A sample is `NUMBER.jpg` (its file's own suffix), `NUMBER.cls` with the index of its class, and `NUMBER.json` with
    the name of its class and its path under `root`. The folder appears when all is written. The same files and seed
    give the same bytes.

    Args:
        root: what `find_source` reads.
        out: the folder to make.
        kind: "image", "video" or "audio", which says what files count.
        splits: their names; None takes those of train, val and test that there are. Classes are those of the first.
        samples: of a shard at most.
        nbytes: of its members, after which a shard ends.
        seed: of the order, so that who reads the shards from front to back finds the classes mixed; None keeps it.
        policy: what an empty or unreadable file does: "skip" leaves it out and counts it, "raise" stops.
        overwrite: whether shards that are there already give way.
        seen: is called with the split, the samples done and all of them.

    Raises:
        ConfigError: an argument that cannot be, `out` is there, or cannot be written.
        MediaError: an unreadable file, under "raise".
    """
    root, out = Path(root), Path(os.path.abspath(out))
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    for option, count in (("--samples", samples), ("--bytes", nbytes)):
        if count < 1:
            raise ConfigError(f"{option} is {count}; it must be at least 1")
    if policy not in ("skip", "raise"):
        raise ConfigError(f"policy is {policy!r}; it must be 'skip' or 'raise'")
    check_folder(root)
    _check_target(out, overwrite)
    sources = _sources(root, kind, splits)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(out) as folder:
            limits = {"maxcount": samples, "maxsize": nbytes}
            written = [_write(source, s, root, folder, limits, seed, policy, seen) for s, source in sources.items()]
            classes = list(next(iter(sources.values())).classes)
            write_atomically(folder / "classes.json", json.dumps(classes, indent=1) + "\n")
            _put(folder, out)
    except MediaError:  # of a file that is read
        raise
    except OSError as error:
        raise ConfigError(f"the shards cannot be written to {str(out)!r}: {error.strerror or error}") from error
    for part in written:
        part.shards = [out / shard.name for shard in part.shards]
    return written


def _sources(root: Path, kind: str, splits: tuple[str, ...] | None) -> dict[str, Source]:
    """The samples of each split that is to be written."""
    splits = splits or tuple(split for split in SPLITS if has_split(root, split))
    if not splits:
        raise ConfigError(f"{str(root)!r} has none of the splits {', '.join(SPLITS)}; name its own with --splits")
    sources: dict[str, Source] = {}
    for split in splits:
        known = next(iter(sources.values())).classes if sources else None
        sources[split] = find_source(root, split, KINDS[kind], known)
    return sources


def _check_target(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"{str(out)!r} is there and no folder; name another")
    inside = sorted(entry.name for entry in os.scandir(out))
    foreign = [name for name in inside if not _OURS.fullmatch(name)]
    if foreign:
        raise ConfigError(f"{str(out)!r} holds {foreign[0]!r}, which is no shard; name a folder for shards alone")
    if inside and not overwrite:
        raise ConfigError(f"{str(out)!r} holds shards already; --overwrite replaces them all")


def _put(folder: Path, out: Path) -> None:
    """Put the finished folder in the place of `out`."""
    old = folder.with_name("replaced")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _write(
    source: Source,
    split: str,
    root: Path,
    folder: Path,
    limits: dict[str, int],
    seed: int | None,
    policy: str,
    seen: Callable[[str, int, int], None],
) -> Written:
    from webdataset.writer import ShardWriter

    done = Written(split=split)
    # ShardWriter puts the number of the shard in by `%`.
    pattern = f"{str(folder).replace('%', '%%')}/{split.replace('%', '%%')}-%06d.tar"
    paths: list[str] = []
    labels: list[int] = []
    # One time for all members, and bytes that are what they are: the same input gives the same shards.
    options = {**limits, "post": paths.append, "verbose": 0, "encoder": False, "mtime": 0.0}
    with ShardWriter(pattern, **options) as writer:
        for place, index in enumerate(_order(len(source), seed), 1):
            try:
                data, suffix = _read(source, index)
            except MediaError as error:
                if policy == "raise":
                    raise
                done.problems[source.name(index)] = str(error)
            else:
                writer.write(_sample(len(labels), data, suffix, source, index, root))
                labels.append(source.label(index))
            seen(split, place, len(source))
    if not labels:
        raise MediaError(f"no file of the split {split!r} can be read, among them {next(iter(done.problems.items()))}")
    done.samples = len(labels)
    done.shards = [Path(path) for path in paths]
    for path in done.shards:
        _finish(path, labels)
        done.nbytes += path.stat().st_size
    return done


def _order(size: int, seed: int | None) -> Iterator[int]:
    if seed is None:
        return iter(range(size))
    return iter(torch.randperm(size, generator=torch.Generator().manual_seed(seed % (1 << 63))).tolist())


def _read(source: Source, index: int) -> tuple[bytes, str]:
    """The bytes of a sample and the suffix that they go by."""
    media, name = source.media(index), source.name(index)
    if isinstance(media, Path):
        try:
            media = media.read_bytes()
        except OSError as error:
            raise MediaError(f"cannot read {name!r}: {error.strerror}") from error
    if not media:
        raise MediaError(f"{name!r} is empty")
    return media, os.path.splitext(name)[1][1:].lower()


def _sample(number: int, data: bytes, suffix: str, source: Source, index: int, root: Path) -> dict[str, Any]:
    label, name = source.label(index), source.name(index)
    path = os.path.relpath(name, root) if os.path.isabs(name) == root.is_absolute() else name
    about = {"class": source.classes[label], "path": path}
    return {
        "__key__": f"{number:08d}",
        suffix: data,
        "cls": str(label).encode(),
        # Names of files that are no UTF-8 are written as the escapes that Python has for them.
        "json": json.dumps(about).encode(),
    }


def _finish(path: Path, labels: list[int]) -> None:
    """Read a shard back, leave its index, and see to it that both are on the disk."""
    rows = []
    for member in TarIndex(path):
        parts = split_key(member.name)
        if parts is not None and parts[1] not in ("cls", "json"):
            rows.append((member, labels[int(parts[0])]))
    write_index(path, rows)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def size_of(text: str) -> int:
    """Bytes from "500000", "64MB" or "1.5G", in units of 1,024.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None:
        raise ConfigError(f"--bytes is {text!r}; it must be a number, with K, M or G perhaps")
    size = float(found[1]) * _UNITS[found[2]]
    if size > 1 << 62:
        raise ConfigError(f"--bytes is {text!r}; no file is that large")
    return int(size)


def main(argv: list[str]) -> int:
    """`omnimix data shard`."""
    parser = argparse.ArgumentParser(prog="omnimix data shard", description="Write labelled files into tar shards.")
    parser.add_argument("root", help="folder with train/CLASS/FILES or train.csv, and the same for val and test")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--kind", required=True, choices=tuple(KINDS), help="which files count")
    parser.add_argument("--splits", help="names of splits, comma between them (default: train, val and test as found)")
    parser.add_argument("--samples", type=int, default=10_000, help="most samples per shard (default: 10000)")
    parser.add_argument("--bytes", default="256M", metavar="SIZE", help="after which a shard ends (default: 256M)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the order of the samples")
    parser.add_argument("--keep_order", action="store_true", help="keep the order of the files, class after class")
    parser.add_argument("--policy", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in OUT")
    add_json(parser)
    options = parser.parse_args(argv)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # Where it has no terminal, a bar leaves an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def seen(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(markup(split), total=total)
            bar.update(tasks[split], completed=done)

        written = shard_folder(
            options.root,
            options.out,
            kind=options.kind,
            splits=tuple(options.splits.split(",")) if options.splits else None,
            samples=options.samples,
            nbytes=size_of(options.bytes),
            seed=None if options.keep_order else options.seed,
            policy=options.policy,
            overwrite=options.overwrite,
            seen=seen,
        )
    for reason in [reason for part in written for reason in part.problems.values()][:10]:
        say(f"skipped: {reason}", error=True)
    rows = [
        {
            "split": part.split,
            "shards": len(part.shards),
            "samples": part.samples,
            "MB": round(part.nbytes / 1e6, 1),
            "skipped": len(part.problems),
        }
        for part in written
    ]
    emit(f"shards in {options.out}", rows, options.json)
    return 0
