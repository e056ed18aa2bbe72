"""Open media files: shared by video and audio reading.

FFmpeg (by PyAV) reads the containers. Headers are not trusted: a truncated file, say of an interrupted download,
often opens and decodes without an error and only ends early.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...errors import MediaError, UnsupportedCall, UnsupportedShape
from ..data.sources import UNNAMED

Media = str | Path | bytes
Source = str | Path | bytes | BinaryIO | io.IOBase

# Containers of media. Left out are formats that name further files or addresses to open (playlists, concatenations)
# and text that FFmpeg would draw as a picture.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,asf,ivf,nut,gif,h264,hevc,av1,"
    "wav,w64,flac,mp3,aac,ogg,aiff,au,amr,caf,ac3,eac3,dts"
)
# Containers whose header states the duration, written when the file was finished; in others it is an estimate.
_STATED = ("mov", "matroska", "flv", "flac")
# The fraction of a file that may be missing: headers round, and a last frame may be left out.
_SLACK = 0.05
# FFmpeg's AVFMT_NOTIMESTAMPS: bare streams, whose frames have no time stamps.
_TIMELESS = 0x80
# Containers that keep the order in which frames are decoded, and codecs that do not say in a frame's header when it is
# shown: FFmpeg's guess is wrong for frames that are shown in another order.
_DECODING_ORDER = ("avi", "asf"), ("h264", "hevc")
# Frames by which the orders of decoding and showing may differ.
_REORDERED = 20
# Freeing a decoder joins its threads, which exist only in the process that forked, so it would never end: what a fork
# copied is kept.
_INHERITED: list[Any] = []
_MICROSECONDS = 1_000_000
_UNKNOWN = 0x7FFF0000
_YEARS = Fraction(1 << 31)  # seconds; later than any file ends


class Tail(NamedTuple):
    """Where the packets of a stream end, in seconds of the file's clock.

    Args:
        last: when the last frame begins.
        end: when it ends.
        whole: whether the packets were read from a key frame on.
    """

    last: Fraction
    end: Fraction
    whole: bool


class Input:
    """A file that is open for reading, and is closed once.

    Args:
        source: a path, the bytes of a file, or an open binary file (which is read from its beginning and left open).
        name: what error messages call it; by default the path.
        threads: how many decode one stream.

    Raises:
        MediaError: missing, empty, or not a media file.
    """

    def __init__(self, source: Source, name: str | None = None, threads: int = 1):
        from av.error import FFmpegError

        self._errors = (FFmpegError, OSError)
        self._process = os.getpid()
        self._source, self._threads = source, threads
        self._container: Any = None
        path = isinstance(source, str | Path)
        self.name = name or (str(source) if path else UNNAMED if isinstance(source, bytes) else "(an open file)")
        if path and not Path(source).is_file():
            raise self.error("there is no such file" if not Path(source).exists() else "it is not a file")
        if not path and not isinstance(source, bytes) and not hasattr(source, "read"):
            raise UnsupportedShape(f"source is a {type(source).__name__}; it must be a path, bytes or an open file")
        if (path and Path(source).stat().st_size == 0) or source == b"":
            raise self.error("it is empty")
        self.open()

    def open(self) -> None:
        """Open the file, again where it was open."""
        import av

        self.close()
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        # FFmpeg takes what precedes a colon in a name for a protocol.
        file = f"file:{source}" if isinstance(source, str | Path) else source
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        with self.reading():
            self._check_size(source)
            self._container = av.open(file, metadata_errors="replace", container_options=options)
        for stream in self._container.streams:
            if stream.codec_context is not None:
                # PyAV takes as many threads as there are processors, in every worker.
                stream.codec_context.thread_count = self._threads
                stream.codec_context.thread_type = "AUTO" if self._threads > 1 else "NONE"

    def _check_size(self, source: Any) -> None:
        """Compare the size with what headers of wav and avi say: FFmpeg silently shortens such files."""
        with open(source, "rb") if isinstance(source, str | Path) else nullcontext(source) as file:
            file.seek(0)
            head, size = file.read(8), file.seek(0, os.SEEK_END)
            file.seek(0)
        stated = int.from_bytes(head[4:], "little") + 8
        # Programs that write into a pipe do not know the size, and state the largest there is.
        if head[:4] == b"RIFF" and stated < _UNKNOWN and size < (1 - _SLACK) * stated:
            raise self.error(f"it was cut: its header says {stated} bytes, but it has {size}")

    def close(self) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        if os.getpid() == self._process:
            container.close()
        else:
            _INHERITED.append(container)

    def error(self, reason: object) -> MediaError:
        return MediaError(f"cannot read {self.name!r}: {reason}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of FFmpeg and the operating system into a MediaError that names the file."""
        try:
            yield
        except MediaError:
            raise
        except self._errors as error:
            raise self.error(getattr(error, "strerror", None) or error) from error

    def check(self) -> None:
        """Raise UnsupportedCall unless the file is open, and was opened by this process."""
        if self._container is None:
            raise UnsupportedCall(f"{self.name!r} has been closed; open it again")
        if os.getpid() != self._process:
            # Both processes would move one file position, and the decoder's threads exist in the other one only.
            raise UnsupportedCall(f"{self.name!r} was opened by another process; open it in the process that reads")

    @property
    def container(self) -> Any:
        self.check()
        return self._container

    def streams(self, kind: str) -> list[int]:
        """Indices of the "video" or "audio" streams that FFmpeg can decode, without cover pictures."""
        from av.stream import Disposition

        return [
            stream.index
            for stream in getattr(self.container.streams, kind)
            if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
        ]

    def stream(self, index: int) -> Any:
        """A stream of the open file; opening the file again makes new ones."""
        return self.container.streams[index]

    def frames(self, index: int) -> Iterator[Any]:
        """The decoded frames of a stream from the file's position on."""
        with self.reading():
            yield from self.container.decode(self.stream(index))

    def seek(self, index: int, seconds: float | Fraction) -> None:
        """Go to the last place at or before a time of the file's clock from which the stream decodes."""
        stream = self.stream(index)
        with self.reading():
            self.container.seek(int(seconds / stream.time_base), stream=stream, backward=True)

    def is_counted(self, index: int) -> bool:
        """Whether the frames of a video stream are to be timed by their order, since its time stamps are guesses.

        Such a stream is decoded from its beginning.
        """
        stream = self.stream(index)
        containers, codecs = _DECODING_ORDER
        guessed = self.container.format.name in containers and stream.codec_context.name in codecs
        return self._is_timeless() or (guessed and bool(stream.codec_context.has_b_frames))

    def _is_timeless(self) -> bool:
        return bool(int(self.container.format.flags) & _TIMELESS)

    def rate(self, index: int) -> Fraction | None:
        """Frames a second of a video stream, on average; None where nothing says it."""
        stream = self.stream(index)
        # FFmpeg states 25 as the average of every bare stream, whatever its header says.
        return (stream.guessed_rate if self._is_timeless() else stream.average_rate) or None

    def frame_seconds(self, index: int) -> Fraction:
        """How long a frame of a video stream lasts on average; 1 / 25 where nothing says it."""
        return 1 / Fraction(self.rate(index) or 25)

    def counted_frames(self, index: int) -> Iterator[tuple[Fraction, Any]]:
        """The decoded frames of a video stream with their times on the file's clock, from the beginning, where the file
        must be; see `is_counted`.

        Decoders give frames in the order in which they are shown, which is that of the decoding times in the container.
        """
        waiting: deque[Fraction] = deque()
        time, lasts, timeless = Fraction(0), self.frame_seconds(index), self._is_timeless()
        with self.reading():
            for packet in self.container.demux(self.stream(index)):
                if packet.dts is not None and packet.size and not timeless:
                    waiting.append(packet.dts * packet.time_base)
                for frame in packet.decode():
                    time = waiting.popleft() if waiting else time
                    yield time, frame
                    time += lasts

    def tail(self, index: int) -> Tail:
        """Where a stream ends, by the file's last packets, read but not decoded; the file's position is lost.

        Raises:
            MediaError: the file ends well before its header says; it was cut.
        """
        tails: dict[int, Tail] = {}
        if not self._is_timeless():
            with suppress(MediaError):
                self.seek(index, _YEARS)
                tails = self._scan()
                if index in tails and not tails[index].whole:
                    # Without an index a seek finds the last packet, whose frame need not be the last one shown.
                    back = max(Fraction(1), _REORDERED * self.frame_seconds(index))
                    self.seek(index, tails[index].last - back)
                    tails = self._scan()
        if index not in tails:
            # No end to seek to, as in a bare stream: from the beginning.
            self.open()
            tails = self._scan()
        if index not in tails:
            raise self.error("the stream is empty")
        stated, found = self.stated_end(), max(tail.end for tail in tails.values())
        if stated is not None and found < stated - slack(stated):
            raise self.error(f"it was cut: its header says {stated:.2f} s, but it ends at {float(found):.2f} s")
        return tails[index]

    def _scan(self) -> dict[int, Tail]:
        last: dict[int, int] = {}
        ends: dict[int, int] = {}
        whole: dict[int, bool] = {}
        counted = {index for index in self.streams("video") if self.is_counted(index)}
        lasts = {index: round(self.frame_seconds(index) / self.stream(index).time_base) for index in counted}
        timeless = self._is_timeless()
        with self.reading():
            for packet in self.container.demux():
                index = packet.stream_index
                when = packet.dts if packet.pts is None or index in counted else packet.pts
                when = None if timeless and index in counted else when
                if not packet.size or packet.is_discard or (when is None and index not in counted):
                    continue
                if when is None:
                    when = ends.get(index, 0)
                    end = when + lasts[index]
                else:
                    end = when + (packet.duration or 0)
                whole.setdefault(index, packet.is_keyframe or packet.stream.type != "video")
                if index not in last or when > last[index]:
                    last[index] = when
                if index not in ends or end > ends[index]:
                    ends[index] = end
        bases = {index: self.stream(index).time_base for index in last}
        return {index: Tail(last[index] * base, ends[index] * base, whole[index]) for index, base in bases.items()}

    def stated_end(self) -> float | None:
        """When the file ends by its header, in seconds of its clock; None where that is a guess."""
        name, duration = self.container.format.name, self.container.duration
        if duration is None or not name.startswith(_STATED):
            return None
        # Matroska counts from zero of its clock, the others from the first time stamp.
        start = 0 if name.startswith("matroska") else self.container.start_time or 0
        return (start + duration) / _MICROSECONDS


def slack(seconds: float) -> float:
    """How much earlier than its header says a whole file may end, in seconds."""
    return max(0.25, _SLACK * seconds)
