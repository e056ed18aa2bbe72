"""The model card of a run: the README.md that hubs of models show, with the front matter that they read."""

from __future__ import annotations

import json
from typing import Any

import yaml

from ...utils.console import visible, write_atomically
from ...utils.run_folder import RunFolder

PIPELINES = {
    "vision": "image-classification",
    "video": "video-classification",
    "audio": "audio-classification",
    "text": "text-generation",
}
# What hubs call a number -> where metrics.json has it.
_METRICS = {"accuracy": "val/acc1", "perplexity": "val/perplexity", "bits_per_byte": "val/bits_per_byte"}
_USE = {
    "vision": 'model.predict("photo.jpg")',
    "video": 'model.predict("clip.mp4")',
    "audio": 'model.predict("recording.wav")',
    "text": 'model.generate("Once upon a time")',
}


def card(task: str, name: str, metrics: dict[str, Any], data: str) -> str:
    """The text of a card.

    Args:
        task: "vision", "video", "audio" or "text".
        name: of the run.
        metrics: its numbers.
        data: the name of the data set.
    """
    measured = {kind: metrics[key] for kind, key in _METRICS.items() if key in metrics}
    head: dict[str, Any] = {"library_name": "omnimix", "pipeline_tag": PIPELINES[task]}
    head["tags"] = ["omnimix", *(str(part).strip() for part in str(metrics.get("mixer", "")).split(",") if part)]
    if measured:
        result = {
            "task": {"type": PIPELINES[task]},
            "dataset": {"name": data, "type": data},
            "metrics": [{"type": kind, "value": value} for kind, value in measured.items()],
        }
        head |= {"metrics": list(measured), "model-index": [{"name": name, "results": [result]}]}
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    rows = [f"| {visible(key)} | {visible(value)} |" for key, value in plain.items()]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        f"# {name}",
        "",
        f"A model for {PIPELINES[task].replace('-', ' ')}, trained with `omnimix {task} fit` on {data}.",
        "",
        "```python",
        "import omnimix as om",
        "",
        'model = om.load("this-folder")',
        _USE[task],
        "```",
        "",
        "`config.yaml` is the configuration of the training, `report.png` shows its curves.",
        "",
        "| measured on held-out samples, and how | |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def write_card(folder: RunFolder, task: str, data: str) -> None:
    """Write the card of a finished run into its folder."""
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    write_atomically(folder.path / "README.md", card(task, folder.path.name, metrics, data))
