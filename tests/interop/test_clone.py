"""Our folders have common names, `kernels` above all, which other packages have too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a clone on sys.path would hide, as `import kernels` finds Hugging Face's package in transformers.
FOLDERS = sorted(init.parent.name for init in ROOT.glob("*/__init__.py") if init.parent.name != "tests")


def run(code: str, where: Path, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_omnimix_hides_no_package(tmp_path):
    assert "kernels" in FOLDERS
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("THEIRS = True\n")
    code = f"""
import importlib, sys
import omnimix
from omnimix import Backbone, LanguageModel, kernels
for name in {FOLDERS!r}:
    theirs, ours = importlib.import_module(name), importlib.import_module("omnimix." + name)
    assert theirs.THEIRS and ours is not theirs and not hasattr(ours, "THEIRS"), name
root = {str(ROOT)!r}
assert root not in sys.path, sys.path
"""
    run(code, tmp_path.parent, PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)]).strip(":"))


@pytest.mark.parametrize("module", ["omnimix.interop.huggingface", "omnimix.interop.timm", "omnimix.interop.lm_eval"])
def test_adapters_import_inside_a_clone(module: str):
    """Python started there has its folder on sys.path; what the adapters import finds other packages all the same."""
    pytest.importorskip(
        {"omnimix.interop.timm": "timm", "omnimix.interop.lm_eval": "lm_eval"}.get(module, "transformers")
    )
    code = f"import sys, {module}; print([m for m in {FOLDERS!r} if m in sys.modules])"
    assert run(code, ROOT) == "[]"
