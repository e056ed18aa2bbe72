"""Graphs that outlive the call that they are recorded from."""

from __future__ import annotations

import torch


def for_every_length() -> bool:
    """Whether torch.export or torch.jit.trace records this call, as a graph that is to serve other batches and lengths.

    No choice may then depend on how many tokens there are: what is right for all of them is recorded. torch.compile
    may choose, as it compiles anew where the choice would be another.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def for_other_runtimes() -> bool:
    """Whether torch.onnx.export records this call: no custom op of ours may then stand in the graph."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
