"""What a fresh install holds, and what importing it costs."""

import os
import re
import shutil
import subprocess
import sys
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


def imported(code: str, after: str = "import torch") -> set[str]:
    """The modules that `code` imports which `after` has not imported before it."""
    done = python(f"import sys\n{after}\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_import_is_lazy_and_costs_little_more_than_torch():
    modules = imported("import omnimix; omnimix.Backbone, omnimix.list_mixers()")
    assert not packages(modules) & set(HEAVY)
    assert not any(name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed.")) for name in modules)
    # Of ours some 180; of others jaxtyping and what torch loads late.
    assert len(modules) < 400


def test_calls_import_no_compiler():
    """A compiler and its packages wait until torch.compile, a tracer or a GPU needs them."""
    code = """
import omnimix as om
for name in om.list_mixers():
    net = om.Backbone(om.BackboneConfig(dim=32, depth=1, pattern=[name]))
    net(torch.randn(1, 5, 32), om.Layout(causal=True)).y.sum().backward()
"""
    modules = imported(code, after="import torch")
    assert not packages(modules) & {"sympy", "triton"}
    assert not any(name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed.")) for name in modules)


def test_the_laziness_test_can_fail():
    assert "torchvision" in packages(imported("import omnimix, torchvision"))


def test_help_imports_nothing_heavy():
    """So that it answers at once."""
    modules = imported("from omnimix.__main__ import main; main(['--help'])", after="pass")
    assert not packages(modules) & {"torch", "numpy", "rich", *HEAVY}
    assert len(modules) < 150


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


def test_the_lowest_versions_are_those_declared():
    """What CI installs to test them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = [re.sub(r"(\[\w+\])?>=([\d.]+).*", r"==\2", requirement) for requirement in project["dependencies"]]
    assert (ROOT / ".ci" / "lowest.txt").read_text().splitlines() == lowest
