"""What every test runs under."""

import os

# Read when a kernel is decorated, hence before any triton.py of ours is imported.
os.environ["TRITON_INTERPRET"] = "1"

import jaxtyping
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_shape_checks():
    """Switches jaxtyping's checks off: torch.compile(fullgraph=True) cannot trace them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", before)
