"""A picture of a film's timeline: some frames, and how likely each class is over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import FigureBase

from ..common.report import INK, LINES, Panel, Row, write_report
from ..common.timeline import scenes
from .film_timeline import FilmMoment

# Frames above the timeline, and classes below it at most.
_FRAMES, _CLASSES = 12, 24


def draw_timeline(path: Path, name: str, classes: Sequence[str], moments: Sequence[FilmMoment]) -> None:
    """Draw the timeline of a film, `moments`, into a PNG file."""
    found = list(scenes(moments))
    length = moments[-1].stop
    title = f"{name}: {len(found)} scenes in {length:.1f} s"
    longest: dict[int, float] = {}
    for scene in found:
        longest[scene.label] = longest.get(scene.label, 0.0) + scene.stop - scene.start
    shares = sorted(longest.items(), key=lambda item: -item[1])[:6]
    subtitle = " · ".join(f"{classes[label]} {seconds / length:.0%}" for label, seconds in shares)
    kept = sorted(label for label, _ in sorted(longest.items(), key=lambda item: -item[1])[:_CLASSES])
    # A few classes are all shown, also those that are never the most likely.
    shown = list(range(len(classes))) if len(classes) <= _CLASSES else kept
    rows = [
        Row(panels=[_frames(moments)], height=1.9),
        Row(panels=[_classes(moments, classes, shown)], height=1.0 + 0.26 * len(shown)),
    ]
    write_report(path, title, subtitle, rows)


def _frames(moments: Sequence[FilmMoment]) -> Panel:
    count = min(_FRAMES, len(moments))
    chosen = [moments[round((i + 0.5) * len(moments) / count - 0.5)] for i in range(count)]

    def draw(figure: FigureBase) -> None:
        for axes, moment in zip(figure.subplots(1, count, squeeze=False)[0], chosen, strict=True):
            frame = moment.frame.clamp(0, 1)
            grey = frame.shape[0] == 1
            axes.imshow(
                (frame[0] if grey else frame.permute(1, 2, 0)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=1
            )
            axes.set_axis_off()
            axes.set_title(f"{0.5 * (moment.start + moment.stop):.1f} s", size=10, color=INK)

    return Panel(draw=draw)


def _classes(moments: Sequence[FilmMoment], classes: Sequence[str], shown: Sequence[int]) -> Panel:
    edges = [moments[0].start, *(moment.stop for moment in moments)]
    table = torch.stack([moment.probabilities for moment in moments])[:, list(shown)].T.numpy()

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        axes.pcolormesh(edges, np.arange(len(shown) + 1) - 0.5, table, cmap="Blues", vmin=0, vmax=1)
        for scene in scenes(moments):
            if scene.label in shown:
                row = shown.index(scene.label)
                axes.hlines(row, scene.start, scene.stop, color=LINES[1], lw=2.5)
        axes.set_yticks(range(len(shown)), [classes[label] for label in shown])
        axes.invert_yaxis()
        axes.set_xlabel("seconds; the shade is the probability, the line the most likely class")
        axes.tick_params(colors=INK, labelsize=9.5, length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    return Panel(draw=draw)
