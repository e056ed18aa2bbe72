"""`omnimix audio predict`: the class of sounds, and the timeline of recordings. Nothing of the training stack is
imported."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..console import emit
from ..errors import CheckpointError, ConfigError, MediaError
from ..modalities import load_model, read_details
from ..modalities.audio_models import AudioClassifier
from .audio_preprocess import SUFFIXES, AudioPreprocess
from .prediction import named_files, ranked, unreadable
from .run import RunFolder
from .timeline import Moment, scenes

# Sounds, and windows of a recording, that run together.
_BATCH = 64
# What a window lasts where the model was trained on whole sounds.
_WINDOW = 1.0


def main(argv: list[str]) -> int:
    """`omnimix audio predict`."""
    parser = argparse.ArgumentParser(
        prog="omnimix audio predict",
        description="Name the class of sound files, or of videos by their sound; of recordings, what is heard when.",
    )
    parser.add_argument("files", nargs="+", help="audio files, video files and folders")
    parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
    parser.add_argument("--top", type=int, default=1, help="classes to name for each file")
    parser.add_argument("--timeline", action="store_true", help="what is heard when in each file, by sliding windows")
    parser.add_argument("--every", type=int, default=4, help="windows to the length of one")
    parser.add_argument("--policy", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too ('-': to standard output, alone)")
    options = parser.parse_args(argv)
    folder = RunFolder.finished(options.run)
    predictor = Predictor(folder.path)
    files = named_files(options.files, SUFFIXES, "sounds")
    if options.timeline:
        rows = predictor.timelines(files, options.every, options.policy)
    else:
        rows = predictor.classes(files, options.top, options.policy)
    emit(f"predictions of {folder.path}", rows, options.json)
    return 0 if any(row["class"] is not None for row in rows) else 1


class Predictor:
    """What a run's model says of files.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: the folder holds no model of sounds.
    """

    def __init__(self, folder: Path):
        model = load_model(folder)
        if not isinstance(model, AudioClassifier):
            raise CheckpointError(
                f"the model in {str(folder)!r} is of the class {type(model).__name__}, and no classifier of sounds"
            )
        self.model = model
        self.preprocess = AudioPreprocess.from_dict(read_details(folder).get("preprocess", {}))

    @torch.inference_mode()
    def classes(self, files: list[Path], top: int = 1, policy: str = "skip") -> list[dict[str, Any]]:
        """One row a file and class, the likeliest first, and why where a file is unreadable.

        Raises:
            MediaError: an unreadable file, with `policy="raise"`.
        """
        rows: list[dict[str, Any]] = []
        for at in range(0, len(files), _BATCH):
            waves: list[Tensor] = []
            readable: list[Path] = []
            for path in files[at : at + _BATCH]:
                try:
                    waves.append(self.preprocess.load(path))
                    readable.append(path)
                except MediaError as error:
                    if policy == "raise":
                        raise
                    rows.append(unreadable(path, error))
            if waves:
                together = waves if self.preprocess.seconds is None else torch.stack(waves)
                for path, logits in zip(readable, self.model(together), strict=True):
                    rows += ranked(path, logits, self.preprocess.classes, top)
        return rows

    def timelines(self, files: list[Path], every: int = 4, policy: str = "skip") -> list[dict[str, Any]]:
        """One row a stretch of one class in each file: file, start, stop, class, probability, and why where it is
        unreadable.

        Args:
            every: windows to the length of one.

        Raises:
            ConfigError: `every` is below 1.
            MediaError: an unreadable file, with `policy="raise"`.
        """
        if every < 1:
            raise ConfigError(f"every is {every}; it must be at least 1")
        rows: list[dict[str, Any]] = []
        for path in files:
            row = {"file": str(path), "start": None, "stop": None, "class": None, "probability": None, "note": ""}
            try:
                wave = self.preprocess.read(path)
            except MediaError as error:
                if policy == "raise":
                    raise
                rows.append(row | {"note": str(error)})
                continue
            for scene in scenes(self.moments(wave, every)):
                found = {
                    "start": round(scene.start, 3),
                    "stop": round(scene.stop, 3),
                    "class": self.preprocess.classes[scene.label],
                    "probability": scene.probability,
                }
                rows.append(row | found)
        return rows

    @torch.inference_mode()
    def moments(self, wave: Float[Tensor, "n"], every: int) -> Iterator[Moment]:
        """What windows say, each for the stretch around its middle; the first and the last for the ends too."""
        rate, length = self.preprocess.rate, wave.shape[0]
        size = round((self.preprocess.seconds or _WINDOW) * rate)
        if length <= size:
            logits = self.model(self.preprocess.fit(wave)[None])[0]
            yield Moment(start=0.0, stop=length / rate, probabilities=logits.float().softmax(-1))
            return
        hop = max(1, size // every)
        starts = [*range(0, length - size, hop), length - size]
        begun = 0.0
        for at in range(0, len(starts), _BATCH):
            some = starts[at : at + _BATCH]
            logits = self.model(torch.stack([wave[start : start + size] for start in some]))
            for start, probabilities in zip(some, logits.float().softmax(-1), strict=True):
                last = start == starts[-1]
                stop = length / rate if last else max(begun, (start + 0.5 * (size + hop)) / rate)
                yield Moment(start=begun, stop=stop, probabilities=probabilities)
                begun = stop
