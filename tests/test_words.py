"""The words of user-facing text are those of the field: messages, help texts, docstrings, comments and pages."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What is not written, and what is written instead.
WORDS = {
    r"channel layers?|other half of (a|the) block": "feed-forward layer",
    r"(only )?looks? (only )?(backwards?|back)\b": "causal",
    r"looks? both ways|both ways|in both senses": "bidirectional",
    r"by scans\b|in several directions": "multi-directional scan",
    r"(go|goes|went|going|gone) on\b": "continue, resume",
    r"\bbehind\b": "after, following; concatenated",
    r"\bwords? (of (a|the) (vocabulary|model|text))": "tokens, vocabulary size, text",
    r"\b(writ(e|es|ten|ing)|wrote) (on|text|words|tokens|by diffusion|token by token|from left)\b": "generate",
    r"from left to right": "autoregressive",
    r"pass(es)? through the model": "denoising steps",
    r"\ba (part|share) (between 0|in \[0|of 1\b)|part between 0 and 1": "a fraction in [0, 1]",
    r"names? the class": "classifies",
    r"what happens when|what is heard when": "labels over time, timeline",
    r"measures? (a|the) run": "evaluates a run",
    r"is no run\b|is no folder\b|of no run\b": "not a run directory",
    r"\bborders?\b": "boundaries, sequence offsets",
    r"\broom for\b": "capacity",
    r"\bbesides?\b": "compared with; next to; except",
    r"\blearnt\b": "learned, trained on",
    r"\blikeliest\b": "the most likely; greedy",
    r"as (it|they) comes?\b": "unchanged; in its original layout",
    r"\bkin\b|\bheirs?\b": "variants, subclasses",
    r"\bthe seventh of\b|\bwhat would be\b": "say it plainly",
}
FOLDERS = ("backbones", "cli", "interop", "kernels", "modalities", "recipes", "utils")
SOURCES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/configs/*.yaml")]


def texts(file: Path) -> list[tuple[int, str]]:
    """What a file says in words, with the lines it begins at: strings and comments of code, the whole of a page."""
    if file.suffix != ".py":
        return list(enumerate(file.read_text(encoding="utf-8").splitlines(), 1))
    with file.open("rb") as opened:
        comments = [(t.start[0], t.string) for t in tokenize.tokenize(opened.readline) if t.type == tokenize.COMMENT]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return comments + [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("file", [*SOURCES, *PAGES], ids=lambda file: str(file.relative_to(ROOT)))
def test_words(file: Path):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]!r}; write: {instead}"
        for line, text in texts(file)
        for pattern, instead in WORDS.items()
        for match in re.finditer(pattern, " ".join(text.split()), re.I)
    ]
    assert not found, "\n".join(found)


def test_the_words_are_found():
    assert re.search([*WORDS][1], "a mixer that only looks backwards")
