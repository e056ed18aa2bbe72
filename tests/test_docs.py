"""The README and the pages of the documentation are true: their code runs, their commands, options and files exist."""

import inspect
import re
from pathlib import Path

import pytest

import omnimix as om
from omnimix import backbones, errors, kernels, modalities
from omnimix.__main__ import COMMANDS
from omnimix.backbones import decoding
from omnimix.cli.commands import markdown, mixer_rows
from omnimix.cli.mixers_check import PAGE, TABLE
from omnimix.modalities.models import save_model

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
CODE = [
    pytest.param(code, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
]


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """A folder with what the pages' code reads: a run called demo, and images."""
    from PIL import Image

    model = om.create_model("vit_tiny_gla_patch16_224", classes=3, dim=16, depth=1, size=16, patch=4, channels=3)
    details = {"classes": ["a", "b", "c"], "size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
    save_model(model, tmp_path / "runs" / "demo", details={"preprocess": details})
    (tmp_path / "runs/demo/config.yaml").write_text("name: demo\n")
    for name in ("digit", "one", "two"):
        Image.new("L", (20, 18), 128).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", CODE)
def test_the_code_runs(code: str, a_run):
    exec(code, {})


def test_the_readme_is_short():
    assert len(PAGES["README.md"].read_text(encoding="utf-8").splitlines()) <= 130


def test_the_tables_of_mixers_are_the_registry():
    table = (ROOT / PAGE).read_text(encoding="utf-8").split(TABLE[0])[1].split(TABLE[1])[0]
    assert table == markdown(mixer_rows()), f"put the output of `omnimix list mixers --markdown` into {PAGE}"
    families = PAGES["README.md"].read_text(encoding="utf-8").split("## Mixers")[1].split("\n## ")[0]
    assert set(om.list_mixers()) <= set(re.findall(r"`(\w+)`", families))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_exist(page: str):
    text = PAGES[page].read_text(encoding="utf-8")
    shell = "".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    named = [
        *re.findall(r"`omnimix ([a-z]+(?: [a-z]+)?)", text),
        *re.findall(r"^omnimix ([a-z]+(?: [a-z]+)?)", shell, re.M),
    ]
    assert all(
        any(f"{command} ".startswith(f"{name} ") or f"{name} ".startswith(f"{command} ") for command in COMMANDS)
        for name in named
    ), named


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page].read_text(encoding="utf-8")):
        assert link.startswith("https://") or (PAGES[page].parent / link).is_file(), link


def test_every_public_name_has_its_page():
    lines = [line for page in ROOT.glob("docs/api/*.md") for line in page.read_text().splitlines()]
    listed = {line.removeprefix("::: ") for line in lines}
    for module in (om, backbones, decoding, kernels, modalities, errors):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("omnimix"):
                assert f"{value.__module__}.{value.__qualname__}" in listed, "see docs/api"


def test_every_page_of_the_api_names_what_exists():
    for page in ROOT.glob("docs/api/*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            module, _, attribute = name.rpartition(".")
            assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
