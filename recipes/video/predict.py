"""`omnimix video predict`: classify clips, and label films over time. The training stack is not imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, MediaError
from ...modalities import load_model
from ...modalities.data.sources import VIDEO_SUFFIXES
from ...modalities.video.files import VideoReader
from ...modalities.video.model import VideoClassifier
from ...utils.console import emit, markup, say, visible
from ...utils.options import output_file
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
from ..common.timeline import Scene, scenes
from .film_timeline import FilmMoment, Timeline
from .preprocess import VideoPreprocess

# Clips that run together.
_BATCH = 8


def main(argv: list[str]) -> int:
    """`omnimix video predict`."""
    parser = argparse.ArgumentParser(
        prog="omnimix video predict",
        description="Classify video clips; longer films get a timeline of labels.",
    )
    parser.add_argument("files", nargs="+", help="video files and folders")
    add_options(parser, "clip", _BATCH)
    add_timeline(parser)
    parser.add_argument("--picture", metavar="FILE", type=output_file, help="draw the timeline of a single file as PNG")
    options = parser.parse_args(argv)
    device = check_options(options)
    check_counts(every=options.every)
    folder = RunFolder.finished(options.run)
    files = named_files(options.files, VIDEO_SUFFIXES, "videos")
    if options.picture and len(files) != 1:
        raise ConfigError(f"--picture draws one file, and {len(files)} are named")
    aloud = not silent(options)
    predictor = Predictor(folder.path, top=options.top, every=options.every, aloud=aloud, device=device)
    clips: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[Path, Tensor]] = []
    for path in files:
        try:
            film = bool(options.picture) or options.timeline
            film = predictor.is_film(path) if film is None else film
            if film:
                rows += predictor.film(path, options.picture)
            else:
                waiting.append((path, predictor.preprocess.load(path)))
        except MediaError as error:
            if options.policy == "raise":
                raise
            clips.append(unreadable(path, error))
        if len(waiting) == options.batch_size:
            clips += predictor.clips(waiting)
            waiting = []
    clips += predictor.clips(waiting)
    if clips and aloud:
        emit(f"predictions of {folder.path}", clips)
    return write_rows(clips + rows, options)


class Predictor:
    """Classifies files with the model of a run.

    Args:
        folder: of the run.
        top: how many classes to list for a clip.
        every: moments of a timeline per clip length.
        aloud: print timelines while they are found.
        device: where the model runs.

    Raises:
        CheckpointError: the folder holds no video classifier.
        ConfigError: `top` or `every` is below 1.
    """

    def __init__(self, folder: Path, *, top: int = 1, every: int = 4, aloud: bool = False, device: torch.device = CPU):
        check_counts(top=top, every=every)
        model = load_model(folder)
        if not isinstance(model, VideoClassifier):
            raise CheckpointError(
                f"the model in {str(folder)!r} is of the class {type(model).__name__}, not a video classifier"
            )
        self.model, self.device = model.to(device), device
        self.preprocess = VideoPreprocess.of_model(folder, model)
        self.classes = self.preprocess.classes
        self.top = top
        self.timeline = Timeline(model, self.preprocess, every, device)
        self.aloud = aloud

    def is_film(self, path: Path) -> bool:
        """Whether a file is much longer than the clips that the model was trained on."""
        with VideoReader(path) as video:
            return video.info.duration >= LONG * self.preprocess.seconds

    @torch.inference_mode()
    def clips(self, loaded: list[tuple[Path, Tensor]]) -> list[dict[str, Any]]:
        """One row per class of each prepared clip, the most likely first."""
        if not loaded:
            return []
        logits = self.model(torch.stack([clip for _, clip in loaded]).to(self.device))
        pairs = zip(loaded, logits, strict=True)
        return [row for (path, _), own in pairs for row in ranked(path, own, self.classes, self.top)]

    def film(self, path: Path, picture: str | None = None) -> list[dict[str, Any]]:
        """One row per scene; scenes are printed while the film is read.

        Args:
            picture: the file to draw the timeline into; this alone takes memory that grows with the film.

        Raises:
            MediaError: the file cannot be read, or only up to some time; what was found before has been printed.
        """
        rows: list[dict[str, Any]] = []
        with VideoReader(path) as video, _progress(path, video.info.duration, self.aloud) as (advance, say):
            seen: list[FilmMoment] = []
            say(f"{path}, {video.info.duration:.1f} s")
            for scene in scenes(_watched(self.timeline.moments(video), advance, seen if picture else None)):
                rows.append(self._row(path, scene))
                say(f"{scene.start:9.2f} – {scene.stop:9.2f} s  {scene.probability:4.0%}  {self.classes[scene.label]}")
        if picture:
            from .timeline_picture import draw_timeline

            draw_timeline(Path(picture), path.name, self.classes, seen)
            say(f"picture: {picture}")
        return rows

    def _row(self, path: Path, scene: Scene) -> dict[str, Any]:
        return {
            "file": str(path),
            "start": round(scene.start, 3),
            "stop": round(scene.stop, 3),
            "rank": 1,
            "class": self.classes[scene.label],
            "probability": scene.probability,
            "note": "",
        }


def _watched(moments: Iterable[FilmMoment], advance: Any, seen: list[FilmMoment] | None) -> Iterator[FilmMoment]:
    for moment in moments:
        advance(moment.stop)
        if seen is not None:
            seen.append(moment)
        yield moment


@contextmanager
def _progress(path: Path, duration: float, aloud: bool) -> Iterator[tuple[Any, Any]]:
    """Two functions: one moves a bar to a time, where there is a terminal, and one prints a line above it."""
    if not aloud:
        yield lambda time: None, lambda line: None
        return
    if not sys.stdout.isatty():
        yield lambda time: None, say
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (BarColumn(), TextColumn("{task.completed:.1f} of {task.total:.1f} s"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(markup(path.name), total=duration)
        # Long lines are not wrapped.
        plain = partial(bar.console.print, highlight=False, soft_wrap=True)
        yield lambda time: bar.update(task, completed=time), lambda line: plain(Text(visible(line)))
