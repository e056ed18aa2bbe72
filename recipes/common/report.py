"""What a run leaves for people: numbers as JSON, and one picture of its curves and of what the model does."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from ...utils.console import short_number, write_atomically
from ...utils.files import replace_file

INK, GRID, RIGHT, WRONG = "#1f2430", "#d9dde5", "#2a7f62", "#c8374a"
LINES = ("#3566b8", "#e08a1e", "#2a7f62", "#8a4fb0")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of the picture.

    Args:
        draw: draws into its part of the figure.
        width: relative to the others in its row.
    """

    draw: Callable[[FigureBase], None]
    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels next to each other, `height` inches high."""

    panels: Sequence[Panel]
    height: float = field(default=4.0)


def write_report(
    path: str | os.PathLike[str], title: str, subtitle: str, rows: Sequence[Row], width: float = 15
) -> None:
    """Draw the rows below each other into a PNG file; an interrupt leaves an older one whole."""
    lines = textwrap.wrap(subtitle, round(9.5 * width))
    head = 0.7 + 0.2 * len(lines)
    heights = [row.height for row in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.08)
    figure = Figure(figsize=(width, head + sum(heights)), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    top, *parts = figure.subfigures(1 + len(rows), 1, height_ratios=[head, *heights], squeeze=False)[:, 0]
    top.text(0.015, 1 - 0.25 / head, title, size=19, weight="bold", color=INK, va="center")
    top.text(0.015, 1 - 0.6 / head, "\n".join(lines), size=11.5, color="#5b6475", va="top")
    for row, part in zip(rows, parts, strict=True):
        widths = [panel.width for panel in row.panels]
        for panel, place in zip(
            row.panels, part.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0], strict=True
        ):
            panel.draw(place)
    replace_file(path, lambda part: figure.savefig(part, dpi=110, format="png"))


def write_metrics(path: str | os.PathLike[str], metrics: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(metrics, indent=1) + "\n")


def curves(
    history: Sequence[dict[str, int | float]],
    lines: dict[str, str],
    title: str,
    *,
    percent: bool = False,
    over: str = "epoch",
) -> Panel:
    """One line for each `name in the legend -> name in the history`, over epochs or steps, for what was logged."""

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        for colour, (label, key) in zip(LINES, lines.items(), strict=False):
            points = [(row[over], row[key] * (100 if percent else 1)) for row in history if key in row]
            if not points:
                continue
            last = f"{points[-1][1]:.1f} %" if percent else short_number(points[-1][1])
            marker = "o" if len(points) < 4 else None
            axes.plot(*zip(*points, strict=True), color=colour, lw=2, marker=marker, label=f"{label}  {last}")
        _style(axes, title)
        axes.set_xlabel(over)
        axes.grid(color=GRID, lw=0.8)
        if percent:
            axes.set_ylabel("%")
            axes.set_ylim(top=100.5)
        if axes.lines:
            axes.legend(frameon=False, loc="best", fontsize=10.5)

    return Panel(draw=draw)


def confusion(counts: Int[Tensor, "c c"], classes: Sequence[str], title: str = "confusion of held-out images") -> Panel:
    """Truth down, prediction across; the shade is the part of the true class, the number is a count."""

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        table = counts.numpy()
        share = table / np.maximum(1, table.sum(1, keepdims=True))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
        _style(axes, title)
        axes.set_xlabel("prediction")
        axes.set_ylabel("truth")
        small = len(classes) <= 20
        places = range(len(classes)) if small else []
        names = [_short(classes[i]) for i in places]
        turned = {"rotation": 45, "ha": "right"} if max(map(len, classes)) > 4 else {}
        axes.set_xticks(places, names, **turned)
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        for i, j in np.argwhere(table > 0) if small else ():
            colour = "white" if share[i, j] > 0.55 else (INK if i == j else WRONG)
            weight = "normal" if i == j else "bold"
            axes.text(j, i, str(table[i, j]), ha="center", va="center", size=9.5, color=colour, weight=weight)

    return Panel(draw=draw, width=1.05)


def text(content: str, title: str, columns: int = 62, lines: int = 30) -> Panel:
    """Text as it is, in a fixed width; long lines are broken, and what does not fit is left out."""
    font = get_font(findfont("monospace"))
    plain = "".join(c if c == "\n" or font.get_char_index(ord(c)) else "□" for c in content.expandtabs(4))
    broken = [line[at : at + columns] for line in plain.split("\n") for at in range(0, max(1, len(line)), columns)]
    shown = [*broken[: lines - 1], "…"] if len(broken) > lines else broken

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(title, loc="left", size=13, weight="bold", color=INK, pad=10, parse_math=False)
        axes.text(0, 1, "\n".join(shown), family="monospace", size=8.5, color=INK, va="top", parse_math=False)

    return Panel(draw=draw)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image of the gallery, in 0..1, with what it is and what the model says."""

    image: Float[Tensor, "c h w"]
    truth: str
    prediction: str
    probability: float

    @property
    def right(self) -> bool:
        return self.truth == self.prediction


def gallery(shown: Sequence[Shown], title: str, columns: int = 12) -> Panel:
    """Images with prediction and truth; wrong ones have a red frame and name both."""

    def draw(figure: FigureBase) -> None:
        rows = max(1, -(-len(shown) // columns))
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.suptitle(title, x=0.015, ha="left", size=13, weight="bold", color=INK)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, item in zip(grid.flat, shown, strict=False):
            axes.set_axis_on()
            axes.set_xticks([])
            axes.set_yticks([])
            grey = item.image.shape[0] == 1
            picture = item.image[0].numpy() if grey else item.image.permute(1, 2, 0).numpy()
            axes.imshow(picture, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
            colour = RIGHT if item.right else WRONG
            for spine in axes.spines.values():
                spine.set(color=colour, lw=1.2 if item.right else 3.5)
            said = f"{_short(item.prediction)}  {item.probability:.0%}"
            text = said if item.right else f"✗ {said}\ntruth: {_short(item.truth)}"
            axes.set_xlabel(text, size=10, color=colour, weight="normal" if item.right else "bold", labelpad=4)

    return Panel(draw=draw)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=13, weight="bold", color=INK, pad=10, parse_math=False)
    axes.tick_params(colors=INK, labelsize=9.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
