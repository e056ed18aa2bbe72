"""What torch has active around a call: compilation, modes, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from .private_torch import CONSTANT_MARK, dispatch_modes, innermost_transform, tracing_state, without_modes

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Let torch.compile call the function while it traces, with constant arguments, and keep the result.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo and with it triton.
    """
    setattr(function, CONSTANT_MARK, True)
    return function


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active, outside torch.compile."""
    return innermost_transform() is not None and not torch.compiler.is_compiling()


def observed() -> bool:
    """Whether a compiler, a tracer, a mode or a transform of torch.func sees what torch computes now."""
    return (
        torch.compiler.is_compiling()
        or dispatch_modes() > 0
        or tracing_state() is not None
        or innermost_transform() is not None
    )


@contextlib.contextmanager
def outliving_modes() -> Iterator[None]:
    """What is made inside is a plain tensor on the CPU that may be kept.

    Whatever is active now (a device context, inference mode, an export's fake tensors) need not be when it is used.
    """
    with torch.inference_mode(False), without_modes(), torch.device("cpu"):
        yield


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; it is not where torch has none."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


# Until torch 2.10 torch.compile cannot trace the question.
@constant_in_graphs
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def own_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Switches off autocast, which would round the factors of single products inside an algorithm that decides on its
    precision itself."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()
