"""Recipes: training from a configuration to a model, its numbers and a picture of what it learned."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"

# Configuration -> the command that trains with it. The first line of its YAML file says what it is.
RECIPES = {
    "vision_classification": "omnimix vision fit",
    "vision_folder": "omnimix vision fit --config vision_folder --data.root DIR",
    "video_understanding": "omnimix video fit",
    "video_folder": "omnimix video fit --config video_folder --data.root DIR",
    "audio_classification": "omnimix audio fit",
    "audio_folder": "omnimix audio fit --config audio_folder --data.root DIR",
    "text_generation": "omnimix text fit",
    "text_files": "omnimix text fit --config text_files --data.path DIR",
}


def recipe_rows() -> list[dict[str, str]]:
    """One row a configuration: its name, the command that trains with it, and what it is."""
    rows = []
    for name, command in RECIPES.items():
        first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        rows.append({"configuration": name, "command": command, "summary": first.lstrip("# ")})
    return rows
