"""Plain tar files read at any place: where each member lies, checked, and bytes by offset in any process."""

from __future__ import annotations

import os
import re
import tarfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ...errors import MediaError
from .sources import Strings

LIMIT = 2 << 30
_BLOCK = tarfile.BLOCKSIZE
# What tarfile raises for files that are broken, or made to break it.
BROKEN = (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError)
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class Member(NamedTuple):
    """A file in a tar file: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


class Stamp(NamedTuple):
    """By what a file is known to be the one that was indexed: its size in bytes and its time, in nanoseconds."""

    size: int
    mtime_ns: int

    @staticmethod
    def of(file: str | Path | int) -> Stamp:
        """Return the stamp of a path or an open descriptor."""
        stat = os.stat(file)
        return Stamp(stat.st_size, stat.st_mtime_ns)


class TarIndex:
    """The members of a plain tar file and their bytes, at any place in any order.

    It holds no open file: reading opens one in the process that reads, and keeps it for the next reads. So it can be
    pickled, forked and spawned.

    Args:
        path: the tar file.
        limit: bytes of a member at most.
        members: what is known already, as `scan` gives it; None scans the headers of the file.

    Raises:
        MediaError: see `scan`.
    """

    def __init__(self, path: str | Path, *, limit: int = LIMIT, members: Iterable[Member] | None = None):
        self.path = str(path)
        with opened(path) as file:
            self.stamp = Stamp.of(file.fileno())
            members = list(scan(path, file, limit=limit) if members is None else members)
        self.names = Strings(member.name for member in members)
        self._offsets = array("q", [member.offset for member in members])
        self._sizes = array("q", [member.size for member in members])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Member:
        return Member(self.names[index], self._offsets[index], self._sizes[index])

    def __iter__(self) -> Iterator[Member]:
        return map(Member, self.names, self._offsets, self._sizes)

    def read(self, index: int) -> bytes:
        """The bytes of a member.

        Raises:
            MediaError: see `read_member`.
        """
        return read_member(self.path, self[index], self.stamp)


def opened(path: str | Path) -> BinaryIO:
    """The tar file, open.

    Raises:
        MediaError: there is none, or it may not be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise MediaError(f"cannot open the shard {str(path)!r}: {error.strerror}") from error


def scan(path: str | Path, file: BinaryIO, *, limit: int = LIMIT) -> Iterator[Member]:
    """The files in a plain tar file, in order, read off its headers.

    Raises:
        MediaError: the archive is compressed, cut short or corrupt, holds anything but files and folders, or a name
            that is absolute, leads upward or occurs twice, or a member beyond `limit`. The message names both.
    """
    shard, size = repr(str(path)), os.fstat(file.fileno()).st_size
    tool = unpacker(file)
    if tool is not None:
        raise MediaError(f"the shard {shard} is compressed, so that nothing in it can be found: {tool} it")
    seen: set[str] = set()
    where = "at its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in headers(archive):
                reason = member_problem(member, limit)
                if reason is None and member.isfile() and member.name in seen:
                    reason = "it occurs twice"
                if reason is None and member.isfile() and member.offset_data + member.size > size:
                    reason = "the shard is cut short inside it"
                if reason is not None:
                    raise MediaError(f"the shard {shard} is refused for its member {member.name!r}: {reason}")
                where = f"after its member {member.name!r}"
                if member.isfile():
                    seen.add(member.name)
                    yield Member(member.name, member.offset_data, member.size)
            end = archive.offset
    except BROKEN as error:
        raise MediaError(f"the shard {shard} cannot be read {where}: {error}") from error
    reason = end_problem(file, end)
    if reason is not None:
        raise MediaError(f"the shard {shard} cannot be read {where}: {reason}")


def headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive in order, in constant memory.

    Raises:
        tarfile.ReadError: a header leads back: a negative size makes tarfile read the same ones for ever.
    """
    last = -1
    for member in archive:
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError(f"the header of {member.name!r} is corrupt")
        last = member.offset
        yield member
        # tarfile keeps every header that it has read.
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # typeshed leaves it out


def unpacker(file: BinaryIO) -> str | None:
    """The tool that unpacks an open file, if it is compressed."""
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    return next((tool for magic, tool in _COMPRESSED.items() if start.startswith(magic)), None)


def member_problem(member: tarfile.TarInfo, limit: int = LIMIT) -> str | None:
    """Why a member is refused, if it is: what no data set needs and what harms those who unpack or read it."""
    parts = re.split(r"[/\\]", member.name)
    if not parts[0] or re.fullmatch(r"[A-Za-z]:", parts[0]):
        return "its path is absolute"
    if ".." in parts:
        return "its path leads out of the archive"
    if member.issym() or member.islnk():
        return f"it is a link to {member.linkname!r}"
    if not (member.isfile() or member.isdir()):
        return "it is neither a file nor a folder"
    # A few bytes may claim to be terabytes of zeros.
    if member.issparse():
        return "it is a sparse file"
    if member.size > limit:
        return f"it has {member.size:,} bytes, more than {limit:,}"
    return None


def end_problem(file: BinaryIO, end: int) -> str | None:
    """Why an open tar file does not end as it should at `end`, after its last member: with zeros alone.

    tarfile takes the end of the file, a corrupt header and junk for the end of the archive, in silence.
    """
    file.seek(end)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK:
        return "it is cut short: a tar file ends with zeros"
    if any(first):
        return "a header is corrupt"
    while chunk := file.read(1 << 20):
        if chunk.count(0) < len(chunk):
            return "data follows its end; several archives in one file are not read"
    return None


def read_member(path: str, member: Member, stamp: Stamp) -> bytes:
    """The bytes of a member, if the file is the one that was indexed and the member is where it was.

    Raises:
        MediaError: it is not, or cannot be read.
    """
    handle = _HANDLES.get(path, stamp)
    # One read fetches the header too, which says whether the index is right.
    start, length = member.offset - _BLOCK, _BLOCK + member.size
    try:
        data = handle.read(start, length)
    except OSError as error:
        raise MediaError(f"cannot read the shard {path!r}: {error.strerror}") from error
    if len(data) < length:
        raise MediaError(f"the shard {path!r} is cut short inside its member {member.name!r}")
    if not _header_fits(data[:_BLOCK], member):
        raise MediaError(f"the shard {path!r} does not have its member {member.name!r} where its index says")
    return data[_BLOCK:]


def _header_fits(header: bytes, member: Member) -> bool:
    name = member.name.encode("utf-8", "surrogateescape")
    # Nearly all: a short name without a prefix. Parsing takes half as long as the read.
    if header.startswith(name + b"\0") and header[124:135] == b"%011o" % member.size and header[345] == 0:
        return True
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    # Names that do not fit the header's field, in ASCII, stand in a header of their own; so do sizes beyond 8 GiB.
    named = not member.name.isascii() or len(member.name) > 100 or found.name == member.name
    return named and found.size == (member.size if member.size < 8 << 30 else found.size)


class _Handle:
    """An open file, closed with the last one who uses it."""

    def __init__(self, path: str):
        self.file = open(path, "rb", buffering=0)
        # For systems that cannot read at an offset (Windows): there threads take turns.
        self._turn = None if hasattr(os, "pread") else threading.Lock()

    def read(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start` on; fewer only where the file ends."""
        data = self._some(start, length)
        # Linux reads at most 2 GiB at once.
        while len(data) < length and (more := self._some(start + len(data), length - len(data))):
            data += more
        return data

    def _some(self, start: int, length: int) -> bytes:
        if self._turn is None:
            return os.pread(self.file.fileno(), length, start)
        with self._turn:
            self.file.seek(start)
            return self.file.read(length)

    def __del__(self) -> None:
        # Without a file it could not be opened.
        if "file" in self.__dict__:
            self.file.close()


class _Handles:
    """The tar files that this process has open, the last `most` that were read."""

    def __init__(self, most: int):
        self.most, self._process = most, os.getpid()
        self._open: OrderedDict[tuple[str, Stamp], _Handle] = OrderedDict()

    def get(self, path: str, stamp: Stamp) -> _Handle:
        if self._process != os.getpid():
            # A forked process has its own numbers, and closes what it inherited.
            self._process, self._open = os.getpid(), OrderedDict()
        handle = self._open.pop((path, stamp), None)
        if handle is None:
            try:
                handle = _Handle(path)
            except OSError as error:
                raise MediaError(f"cannot open the shard {path!r}: {error.strerror}") from error
            if Stamp.of(handle.file.fileno()) != stamp:
                raise MediaError(f"the shard {path!r} has changed since it was indexed; start again")
        self._open[path, stamp] = handle
        # Another thread may have let it go at the same moment.
        while len(self._open) > self.most:
            self._open.popitem(last=False)
        return handle


_HANDLES = _Handles(64)
