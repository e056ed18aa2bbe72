"""Random reads of good and bad videos in forked and spawned workers.

`python tests/modalities/decoder_stress.py 500` makes 500 reads and prints what came of them.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from omnimix.errors import MediaError
from omnimix.modalities import Dense, Segments, Uniform, VideoReader, read_clip, write_video

SIDE, CELLS = 64, 4
GROWTH = 50 * 2**20


def barcodes(numbers: list[int], side: int = SIDE) -> Tensor:
    """Frames whose pixels say a number below 2 ** 15: a cell a bit, and one that is always white."""
    cell = side // CELLS
    bits = torch.tensor([[1, *((number >> bit) & 1 for bit in range(15))] for number in numbers])
    cells = bits.view(-1, 1, CELLS, CELLS).to(torch.uint8) * 255
    return cells.repeat_interleave(cell, 2).repeat_interleave(cell, 3).expand(-1, 3, -1, -1).contiguous()


def numbers_in(frames: Tensor) -> list[int]:
    """The numbers of `barcodes`, out of decoded frames."""
    cell = frames.shape[-1] // CELLS
    centres = frames[:, :, cell // 2 :: cell, cell // 2 :: cell].float().mean(1).flatten(1)
    assert (centres[:, 0] > 128).all()
    return [sum(int(value > 128) << bit for bit, value in enumerate(row[1:])) for row in centres]


@dataclass(frozen=True)
class Film:
    """A file and when each of its frames appears; without times, a file that cannot be read."""

    path: Path
    times: tuple[float, ...]
    length: float

    def frame(self, time: float) -> int:
        return max(0, bisect_right(self.times, time) - 1)


def films(folder: Path, count: int = 90) -> list[Film]:
    """Constant and variable rate, a clock that does not begin at zero, one frame, truncated, empty."""
    draw = random.Random(0)
    even = [index / 25 for index in range(count)]
    gaps = [draw.choice((1, 2, 6)) for _ in range(count)]
    uneven = [sum(gaps[:index]) / 50 for index in range(count)]
    made = []
    for name, times, start in (
        ("constant.mp4", even, 0.0),
        ("constant.webm", even, 0.0),
        ("variable.mp4", uneven, 0.0),
        ("variable.mkv", uneven, 0.0),
        ("late.mp4", even, 3.0),
        ("late.mkv", uneven, 7.0),
        ("one.mp4", [0.0], 0.0),
        ("one.webm", [0.0], 2.0),
    ):
        kind = {"rate": 25.0} if times is even or len(times) == 1 else {"times": times}
        write_video(folder / name, barcodes(list(range(len(times)))), start=start, keyframes=12, **kind)
        made.append(Film(folder / name, tuple(times), times[-1] + 0.04))
    for name in ("constant.mp4", "constant.webm", "variable.mkv"):
        whole = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
        made.append(Film(folder / f"cut_{name}", (), 0.0))
    (folder / "empty.mp4").touch()
    return [*made, Film(folder / "empty.mp4", (), 0.0)]


class Reads(Dataset):
    """Read number `index`: a film, a way to choose times, from its path or its bytes."""

    def __init__(self, films: list[Film], count: int):
        self.films, self.count = films, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        draw = random.Random(index)
        film = draw.choice(self.films)
        source = film.path if draw.random() < 0.5 else film.path.read_bytes()
        problem, error = "", 0.0
        try:
            error = self._read(film, source, draw)
            if not film.times:
                problem = f"{film.path.name} was read"
        except MediaError as bad:
            if film.times:
                problem = str(bad)
        except AssertionError as wrong:
            problem = f"{film.path.name}: {wrong}"
        worker = get_worker_info()
        return {
            "worker": worker.id if worker else 0,
            "bad": not film.times,
            "problem": problem,
            "error": error,
            "memory": resident(),
        }

    @staticmethod
    def _read(film: Film, source: Path | bytes, draw: random.Random) -> float:
        kind = draw.randrange(5)
        if kind < 3:
            sampling = (Uniform(6), Segments(6), Dense(6, 10.0))[kind]
            clip = read_clip(source, sampling, seed=draw.randrange(1000))
            found = clip.times.tolist()
            expected = [film.frame(time + 0.005) for time in found]
            assert not film.times or numbers_in(clip.frames) == expected, f"{numbers_in(clip.frames)} for {expected}"
            return max(abs(time - film.times[n]) for time, n in zip(found, expected, strict=True))
        with VideoReader(source) as video:
            if kind == 3:
                start = moment(draw, 0, film.length)
                seen = list(video.stream(start, start + 0.5))
                expected = [n for n, time in enumerate(film.times) if start <= time < start + 0.5]
                frames = torch.stack([frame for _, frame in seen]) if seen else torch.zeros(0, 3, SIDE, SIDE)
                found = [time for time, _ in seen]
            else:
                wanted = [moment(draw, -0.5, film.length + 0.5) for _ in range(6)]
                clip = video.at(wanted)
                expected = [film.frame(time) for time in wanted]
                frames, found = clip.frames, clip.times.tolist()
        assert not film.times or numbers_in(frames) == expected, f"{numbers_in(frames)} for {expected}"
        return max((abs(time - film.times[n]) for time, n in zip(found, expected, strict=True)), default=0.0)


def moment(draw: random.Random, low: float, high: float) -> float:
    """A time that is on no edge between two frames: all of them begin at multiples of 20 ms."""
    return draw.randrange(int(low * 100), int(high * 100)) / 100 + 0.005


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stress(folder: Path, count: int) -> dict[str, object]:
    """Half of the reads in two forked workers, half in two spawned ones, after this process itself decoded.

    Returns:
        The number of reads and of those that were refused as they should be, problems, the largest error of a time
        stamp, and the largest growth of a worker's memory after the first third of its reads.
    """
    made = films(folder)
    report: dict[str, object] = {"reads": 0, "refused": 0, "problems": [], "error": 0.0, "growth": 0}
    # A reader that lives while the process forks, with threads that the children do not have.
    with VideoReader(made[0].path, threads=2) as living:
        living.at([1.0])
        for context in ("fork", "spawn"):
            loader = DataLoader(
                Reads(made, count // 2),
                batch_size=None,
                num_workers=2,
                multiprocessing_context=context,
                timeout=120,
            )
            memory: dict[int, list[int]] = {0: [], 1: []}
            for read in loader:
                report["reads"] += 1
                report["refused"] += read["bad"] and not read["problem"]
                report["problems"] += [read["problem"]] if read["problem"] else []
                report["error"] = max(report["error"], read["error"])
                memory[read["worker"]].append(read["memory"])
            for held in memory.values():
                warm = max(1, len(held) // 3)
                report["growth"] = max(report["growth"], max(held[warm:]) - max(held[:warm]))
    return report


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        report = stress(Path(folder), count)
    print(f"{report['reads']} reads of {count}, {report['refused']} refused as they should be")
    print(f"time stamps at most {report['error'] * 1000:.2f} ms off; memory grew by {report['growth'] / 2**20:.1f} MB")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    fine = not report["problems"] and report["reads"] == count // 2 * 2 and report["refused"] > 0
    return 0 if fine and report["error"] < 0.01 and report["growth"] < GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
