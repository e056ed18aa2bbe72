"""The model card of a run: README.md, as hubs of models read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...utils.console import write_atomically
from ...utils.version import __version__

# What is trained -> what hubs call the task, how the model is used, and what of its numbers is told.
_TASKS = {
    "vision": ("image-classification", 'print(model.predict("image.png"))', ("val/acc1", "val/acc5", "val/loss")),
    "video": ("video-classification", 'print(model.predict("clip.mp4"))', ("val/acc1", "val/acc5", "val/loss")),
    "audio": ("audio-classification", 'print(model.predict("sound.wav"))', ("val/acc1", "val/acc5", "val/loss")),
    "text": (
        "text-generation",
        'print(model.generate("The beginning", max_new_tokens=50)[0].text)',
        ("val/bits_per_byte", "val/perplexity", "val/loss"),
    ),
}
_NAMES = {
    "val/acc1": "accuracy",
    "val/acc5": "top-5 accuracy",
    "val/loss": "loss",
    "val/bits_per_byte": "bits per byte",
    "val/perplexity": "perplexity",
}
# Classes that are named one by one.
_MOST = 100


def card(task: str, name: str, metrics: dict[str, Any], data: str, classes: Sequence[str] = ()) -> str:
    """The text of a model card.

    Args:
        task: "vision", "video", "audio" or "text".
        name: of the run.
        metrics: of `metrics.json`.
        data: the name of the data set.
        classes: by index.
    """
    pipeline, use, told = _TASKS[task]
    measured = {_NAMES[key]: metrics[key] for key in told if key in metrics}
    head: dict[str, Any] = {
        "library_name": "omnimix",
        "pipeline_tag": pipeline,
        "tags": ["omnimix", *dict.fromkeys(str(metrics["mixer"]).replace("+", ",").split(","))],
    }
    kind = "perplexity" if task == "text" else "accuracy"
    if kind in measured:
        result = {
            "task": {"type": pipeline},
            "dataset": {"name": data, "type": data},
            "metrics": [{"type": kind, "value": measured[kind]}],
        }
        head |= {"metrics": [kind], "model-index": [{"name": name, "results": [result]}]}
    facts = {
        "mixer": metrics["mixer"],
        "parameters": f"{metrics['parameters']:,}",
        "configuration": metrics["configuration"],
        "seed": metrics["seed"],
        "precision": metrics["precision"],
        "training": f"{metrics['train_seconds']:,.0f} s, omnimix {__version__}",
        **({"started from": metrics["init"]} if "init" in metrics else {}),
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        "| on validation data | |",
        "| --- | --- |",
        *(f"| {key} | {value:.4g} |" for key, value in measured.items()),
        "",
        "![Curves and examples](report.png)",
        "",
        "```python",
        "import omnimix as om",
        "",
        'model = om.load("PATH OF THIS FOLDER")',
        use,
        "```",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in facts.items()),
    ]
    if classes:
        shown = ", ".join(map(_cell, classes[:_MOST])) + (
            f" and {len(classes) - _MOST} more" if len(classes) > _MOST else ""
        )
        lines += ["", f"Classes: {shown}."]
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    """Text within a table of Markdown."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def write_card(folder: Path, task: str, metrics: dict[str, Any], data: Any, classes: Sequence[str] = ()) -> None:
    """Write the card into a run's folder; `data` is the data set."""
    write_atomically(folder / "README.md", card(task, folder.name, metrics, type(data).__name__, classes))
