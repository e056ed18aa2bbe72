"""What every test runs under."""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

# Read when a kernel is decorated, hence before any triton.py of ours is imported.
os.environ["TRITON_INTERPRET"] = "1"
# One thread for each test process and for each process that a test starts. More of them only get in each other's way:
# shapes are small, and tests run side by side. Read when torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch


class _Unchecked(importlib.abc.MetaPathFinder):
    """Leaves Triton kernels out of the shape checks: the interpreter needs their own source and globals."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("omnimix.kernels.") and name.rpartition(".")[2].startswith("triton"):
            return importlib.machinery.PathFinder.find_spec(name, path, target)
        return None


sys.meta_path.insert(0, _Unchecked())

_jaxtyped = jaxtyping.jaxtyped


def _with_shapes_only(fn=None, /, **options):
    """Leave functions without shapes of tensors unchecked: the import hook decorates all, which doubles tests' time."""

    def decorate(target):
        annotations = getattr(target, "__annotations__", {}).values()
        return _jaxtyped(target, **options) if any("[Tensor," in str(a) for a in annotations) else target

    return decorate if fn is None else decorate(fn)


jaxtyping.jaxtyped = _with_shapes_only


def _prepare_languages_once():
    """Triton's interpreter prepares the language anew at each call of a device function, though a launch already did.

    Without that interpreted tests take a quarter less time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def prepare_once(fn):
        languages = [m for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())]
        ready = languages and not any(tl.core.is_builtin(m.load) for m in languages)
        return interpreter._LangPatchScope() if ready else prepare(fn)

    interpreter._patch_lang = prepare_once


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    _prepare_languages_once()

# The variable above comes too late where a plugin has loaded torch.
torch.set_num_threads(1)


# What `make test-fast` leaves out by file, relative to this folder: what is built on kernels and backbones, whole runs,
# other packages' models, processes, compilers and interpreted kernels. In the other files single tests are marked.
SLOW = (
    "backbones/test_decoding.py",
    "backbones/test_decoding_faults.py",
    "backbones/test_diffusion.py",
    "backbones/test_graphs.py",
    "cli/test_bench_*.py",
    "cli/test_compile_kernels.py",
    "cli/test_mixers_check.py",
    "interop/*",
    "kernels/test_export.py",
    "kernels/test_triton_*.py",
    "laws/test_examples.py",
    "laws/test_fuzz.py",
    "laws/test_law_8.py",
    "laws/test_low_precision.py",
    "laws/test_mixer_mutations.py",
    "laws/test_modality_laws.py",
    "laws/test_sharding.py",
    "modalities/*",
    "recipes/*",
    "test_contributing.py",
    "test_package.py",
    "test_docs.py",
)


@functools.cache
def _is_slow(path):
    folder = Path(__file__).parent
    return path.is_relative_to(folder) and any(path.relative_to(folder).match(pattern) for pattern in SLOW)


def pytest_ignore_collect(collection_path, config):
    """Skip slow files as a whole where no slow test is wanted, since what they import takes long too."""
    if config.option.markexpr == "not slow" and _is_slow(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        interpreted = any(isinstance(value, str) and value == "triton" for value in values)
        if _is_slow(item.path) or interpreted:
            item.add_marker(pytest.mark.slow)
        if not HAS_TRITON and (interpreted or item.get_closest_marker("triton")):
            item.add_marker(pytest.mark.skip(reason="the package triton is not installed"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_gradient():
    """Names of the parameters on which a loss of a model's output does not depend.

    Called with the model and a function from the model to the loss. Parameters that start as zeros, behind which
    nothing has a gradient at first, get small values before.
    """

    from .laws.zeros import without_zeros

    def names(model, loss):
        loss(without_zeros(model)).backward()
        return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    return names


@pytest.fixture
def without_shape_checks():
    """Switches jaxtyping's checks off: torch.compile(fullgraph=True) cannot trace them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", before)
