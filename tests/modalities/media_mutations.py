"""Damaged media files through every reader, and how much memory it takes to read them.

`python tests/modalities/media_mutations.py 500 0` reads 500 files of each kind, damaged by the seed 0, and prints what
came of them as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omnimix.errors import MediaError
from omnimix.modalities import Uniform, VideoReader, load_image, read_audio, read_clip, write_audio, write_video

_IMAGES = {
    "jpeg": {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"},
    "png": {},
    "webp": {"lossless": True},
    "gif": {},
    "tiff": {"compression": "tiff_lzw"},
    "bmp": {},
}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def largest() -> int:
    """The most bytes of memory that this process has held; `ru_maxrss` counts those of the parent before it too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def peak_of(call: Callable[[], object]) -> int:
    """By how many bytes the memory of this process grows at most during a call, watched each millisecond."""
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        most[0] = max(most[0], resident() - before)
        done.set()
        watcher.join()
    return most[0]


def tiny_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """Whole files of a few kilobytes by their kind and format."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    images = {}
    for form, options in _IMAGES.items():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form, **options)
        images[form] = file.getvalue()
    wave = torch.sin(torch.arange(9600) * 0.05)[None] * 0.5
    sounds = {}
    for form, rate in (("wav", 16000), ("flac", 16000), ("mp3", 16000), ("ogg", 48000)):
        write_audio(folder / f"sound.{form}", wave, rate)
        sounds[form] = (folder / f"sound.{form}").read_bytes()
    frames = torch.from_numpy(pixels).permute(2, 0, 1).repeat(5, 1, 1, 1)
    films = {}
    for form in ("mp4", "mkv", "webm", "avi"):
        sound = None if form == "avi" else (wave, 48000 if form == "webm" else 16000)
        write_video(folder / f"film.{form}", frames, rate=10, audio=sound, quality=40)
        films[form] = (folder / f"film.{form}").read_bytes()
    return {"image": images, "audio": sounds, "video": films}


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with some of its bytes changed, cut off, inserted, or exchanged with others."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        # Half of the time in the first bytes, where headers are.
        at = draw.randrange(min(len(data), 200) if draw.random() < 0.5 else len(data))
        kind, length = draw.randrange(10), draw.choice((1, 2, 4, 8, 40))
        if kind < 5:
            data[at] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        elif kind < 6:
            data[at] ^= 1 << draw.randrange(8)
        elif kind < 7:
            data[at:at] = draw.randbytes(length)
        elif kind < 8:
            other = draw.randrange(len(data))
            low, high = sorted((at, other))
            length = min(length, high - low, len(data) - high)
            data[low : low + length], data[high : high + length] = data[high : high + length], data[low : low + length]
        elif kind < 9:
            del data[at : at + length]
        elif at > 16:
            del data[at:]
        if not data:
            return b"\0"
    return bytes(data)


def _film(data: bytes) -> None:
    clip = read_clip(data, Uniform(3), seed=0)
    with VideoReader(data) as video:
        for _, frame in islice(video.stream(), 10):
            assert frame.shape[1:] == video.info.size
        list(islice(video.stream(rate=20), 10))
    assert clip.frames.shape[:2] == (3, 3)


def _sound(data: bytes) -> None:
    for window in ({}, {"rate": 8000}, {"start": 0.1, "duration": 0.1, "mono": False}):
        wave, _ = read_audio(data, **window)
        assert wave.abs().max() <= 32, "resampling overshoots, but not to that"


def _picture(data: bytes) -> None:
    for mode in ("RGB", "L"):
        pixels = load_image(data, mode)
        assert pixels.min() >= 0 and pixels.max() <= 1


READERS = {"image": (_picture,), "audio": (_sound,), "video": (_film, _sound)}


def read_all(count: int, seed: int) -> Counter[str]:
    """What comes of reading so many damaged files of each kind: results, `MediaError`s, and anything else by name."""
    draw, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = tiny_files(Path(folder))
    for kind, readers in READERS.items():
        for number in range(count):
            form = list(files[kind])[number % len(files[kind])]
            data = damaged(files[kind][form], draw)
            for reader in readers:
                try:
                    reader(data)
                    outcomes[f"{kind}: read"] += 1
                except MediaError:
                    outcomes[f"{kind}: refused"] += 1
                except Exception as error:
                    outcomes[f"file {number} of seed {seed}, {form}: {error!r}"] += 1
    return outcomes


def main() -> int:
    # Pillow's, of images that are refused all the same.
    warnings.simplefilter("ignore")
    count, seed = (int(word) for word in sys.argv[1:3])
    outcomes = read_all(count, seed)
    print(json.dumps({"outcomes": outcomes, "peak": largest()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
