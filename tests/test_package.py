"""What a fresh install holds, and what importing it costs."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "triton",
    "transformers",
    "lightning",
    "av",
    "timm",
    "torchaudio",
    "torchvision",
    "torchmetrics",
    "matplotlib",
    "sklearn",
)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")


def cost_of(code: str) -> tuple[float, set[str]]:
    """Processor time of `code` in parts of what `import torch` took before it, and the heavy packages it imported.

    One interpreter measures both, in processor time, so that a busy machine changes neither much.
    """
    script = f"""
import sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
{code}
print((time.process_time() - middle) / (middle - start), *(set(sys.modules) - before))
"""
    done = python(script)
    assert done.returncode == 0, done.stderr
    ratio, *modules = done.stdout.split()
    return float(ratio), {name.split(".")[0] for name in modules} & set(HEAVY)


def test_import_is_lazy_and_costs_little_more_than_torch():
    cost, heavy = cost_of("import omnimix; omnimix.Backbone, omnimix.list_mixers()")
    assert not heavy
    assert cost <= 0.3


def test_the_laziness_test_can_fail():
    cost, heavy = cost_of("import omnimix, torchvision")
    assert "torchvision" in heavy
    assert cost > 0.3


def seconds(code: str, times: int) -> float:
    """The best of several runs of a fresh interpreter."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        assert python(code).returncode == 0
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_help_answers_at_once():
    bare = seconds("pass", times=5)
    ours = seconds("import sys; from omnimix.__main__ import main; sys.exit(main(['--help']))", times=5)
    # 0.3 s on an idle machine; on a busy one the bare interpreter says how busy it is.
    assert ours <= max(0.3, 6 * bare), (ours, bare)


def shipped_files() -> list[Path]:
    """Everything below the folders of code, without the environment or the runs that may lie beside them."""
    tops = [init.parent for init in ROOT.glob("*/__init__.py") if init.parent.name not in {"tests", "build", "dist"}]
    return [file for top in tops for file in top.rglob("*")]


def test_pyproject_lists_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT).parts for file in shipped_files() if file.name == "__init__.py"]
    assert sorted(listed) == sorted(["omnimix", *(".".join(["omnimix", *parts]) for parts in folders)])


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package, built as a wheel from a copy of the source and installed into a folder of its own."""
    place = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, place / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place), str(place / "source")]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = place.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    target = place / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def test_the_installed_wheel_runs(installed):
    done = subprocess.run(
        [sys.executable, "-m", "omnimix", "list", "mixers"],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    assert "gla" in done.stdout and "attention" in done.stdout
    script = subprocess.run(
        [sys.executable, str(installed / "bin" / "omnimix"), "--help"],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert script.returncode == 0 and "omnimix vision fit" in script.stdout


def test_the_wheel_holds_every_module_source_and_configuration(installed):
    """And it is the installed copy that runs, not the source that the environment knows."""
    code = "import omnimix; from omnimix.recipes import recipe_rows; print(omnimix.__file__); print(recipe_rows())"
    done = python(code, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    ours = {p.relative_to(ROOT) for p in shipped_files() if p.suffix in {".py", ".yaml", ".cpp", ".h"}}
    missing = sorted(str(p) for p in ours if not (installed / "omnimix" / p).is_file())
    assert len(ours) > 100 and not missing
