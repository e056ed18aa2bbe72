"""What every Triton kernel of ours shares: when it may run, how it is tuned, what a launch checks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


def triton_refusal(arguments: Mapping[str, Any]) -> str | None:
    """Why Triton cannot serve a call with these arguments; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    devices = {a.device.type for a in arguments.values() if isinstance(a, Tensor)}
    # Meta tensors pass: ahead-of-time compilation runs the launchers on them.
    unusable = devices - ({"cpu", "meta"} if interpreting() else {"cuda", "meta"})
    if unusable:
        return f"Triton needs a GPU, and the tensors are on {', '.join(sorted(unusable))}"
    return None
