"""`omnimix audio predict`: classify clips, and label recordings over time. The training stack is not imported."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import CheckpointError, MediaError
from ...modalities import load_model
from ...modalities.audio.model import AudioClassifier
from ...utils.console import emit
from ...utils.run_folder import RunFolder
from ..common.prediction import (
    CPU,
    LONG,
    add_options,
    add_timeline,
    check_counts,
    check_options,
    named_files,
    ranked,
    silent,
    unreadable,
    write_rows,
)
from ..common.timeline import Moment, scenes
from .preprocess import SUFFIXES, AudioPreprocess

# Files, and windows of a recording, that run together.
_BATCH = 64
# Seconds of a window where the model was trained on whole clips.
_WINDOW = 1.0


def main(argv: list[str]) -> int:
    """`omnimix audio predict`."""
    parser = argparse.ArgumentParser(
        prog="omnimix audio predict",
        description="Classify audio files, or videos by their sound; long recordings get a timeline of labels.",
    )
    parser.add_argument("files", nargs="+", help="audio files, video files and folders")
    add_options(parser, "file", _BATCH)
    add_timeline(parser)
    options = parser.parse_args(argv)
    device = check_options(options)
    check_counts(every=options.every)
    folder = RunFolder.finished(options.run)
    files = named_files(options.files, SUFFIXES, "sounds")
    predictor = Predictor(folder.path, batch_size=options.batch_size, device=device)
    clips, rows = predictor.heard(files, options.timeline, options.top, options.every, options.policy)
    for title, some in (("predictions", clips), ("timelines", rows)):
        if some and not silent(options):
            emit(f"{title} of {folder.path}", some)
    return write_rows(clips + rows, options)


class Predictor:
    """Classifies files with the model of a run.

    Args:
        folder: of the run.
        batch_size: files, or windows of a recording, that run together, at most.
        device: where the model runs.

    Raises:
        CheckpointError: the folder holds no audio classifier.
    """

    def __init__(self, folder: Path, *, batch_size: int = _BATCH, device: torch.device = CPU):
        model = load_model(folder)
        if not isinstance(model, AudioClassifier):
            raise CheckpointError(
                f"the model in {str(folder)!r} is of the class {type(model).__name__}, not an audio classifier"
            )
        self.model, self.batch_size, self.device = model.to(device), batch_size, device
        self.preprocess = AudioPreprocess.of_model(folder, model)

    def heard(
        self, files: list[Path], timeline: bool | None = None, top: int = 1, every: int = 4, policy: str = "skip"
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Classify files.

        Args:
            timeline: label every file over time; None does so for files much longer than the training clips.
            top: how many classes to list for a file without a timeline.
            every: windows of a timeline per window length.
            policy: "skip" or "raise", for unreadable files.

        Returns:
            One row per class of each file without a timeline, the most likely first, or why the file is unreadable; and
            one row per segment of the others.

        Raises:
            ConfigError: `top` or `every` is below 1.
            MediaError: an unreadable file, with `policy="raise"`.
        """
        check_counts(top=top, every=every)
        clips: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        waves: list[tuple[Path, Tensor]] = []
        for path in files:
            try:
                wave = self.preprocess.read(path)
            except MediaError as error:
                if policy == "raise":
                    raise
                clips.append(unreadable(path, error))
                continue
            if self._is_long(wave) if timeline is None else timeline:
                rows += self._timeline(path, wave, every)
                continue
            # A copy: the part alone would keep the whole wave in memory.
            waves.append((path, self.preprocess.fit(wave).clone()))
            if len(waves) == self.batch_size:
                clips += self._classes(waves, top)
                waves = []
        return clips + self._classes(waves, top), rows

    def _is_long(self, wave: Float[Tensor, " n"]) -> bool:
        seconds = self.preprocess.seconds
        return seconds is not None and wave.shape[0] >= LONG * seconds * self.preprocess.rate

    @torch.inference_mode()
    def _classes(self, waves: list[tuple[Path, Tensor]], top: int) -> list[dict[str, Any]]:
        if not waves:
            return []
        together = [wave.to(self.device) for _, wave in waves]
        logits = self.model(together if self.preprocess.seconds is None else torch.stack(together))
        return [
            row
            for (path, _), own in zip(waves, logits, strict=True)
            for row in ranked(path, own, self.preprocess.classes, top)
        ]

    def _timeline(self, path: Path, wave: Float[Tensor, " n"], every: int) -> list[dict[str, Any]]:
        return [
            {
                "file": str(path),
                "start": round(scene.start, 3),
                "stop": round(scene.stop, 3),
                "rank": 1,
                "class": self.preprocess.classes[scene.label],
                "probability": scene.probability,
                "note": "",
            }
            for scene in scenes(self.moments(wave, every))
        ]

    @torch.inference_mode()
    def moments(self, wave: Float[Tensor, " n"], every: int) -> Iterator[Moment]:
        """The prediction of each window for the segment around its middle; the outer ones cover the ends too."""
        rate, length = self.preprocess.rate, wave.shape[0]
        size = round((self.preprocess.seconds or _WINDOW) * rate)
        if length <= size:
            logits = self.model(self.preprocess.fit(wave)[None].to(self.device))[0].cpu()
            yield Moment(start=0.0, stop=length / rate, probabilities=logits.float().softmax(-1))
            return
        hop = max(1, size // every)
        starts = [*range(0, length - size, hop), length - size]
        begun = 0.0
        for at in range(0, len(starts), self.batch_size):
            some = starts[at : at + self.batch_size]
            logits = self.model(torch.stack([wave[start : start + size] for start in some]).to(self.device)).cpu()
            for start, probabilities in zip(some, logits.float().softmax(-1), strict=True):
                last = start == starts[-1]
                stop = length / rate if last else max(begun, (start + 0.5 * (size + hop)) / rate)
                yield Moment(start=begun, stop=stop, probabilities=probabilities)
                begun = stop
