"""The backends of an op, as our folders have them."""

from __future__ import annotations

from collections.abc import Callable

from .common.tools import triton_refusal
from .native import native_refusal, step_refusal
from .registry import Arguments, Backend, serves_everything


def backends(
    op: str,
    *names: str,
    triton: Callable[[Arguments], str | None] = triton_refusal,
    native: Callable[[Arguments], str | None] | None = None,
    native_limits: Callable[[Arguments], str | None] = serves_everything,
    triton_limits: Callable[[Arguments], str | None] = serves_everything,
) -> tuple[Backend, ...]:
    """Backends by name, in `auto`'s order: `<op>_<name>` in `kernels/<op>/<name>.py`, each on the devices it is for.

    Args:
        op: the op's name.
        names: of "native" (C++ on CPUs), "triton" (GPUs), "chunked" (any device) and "reference" (only when named).
        triton: the `refuse` of the Triton backend, where it has reasons of its own.
        triton_limits: the `limits` of the Triton backend, where it is for some calls only.
        native: the `limits` of a native backend that has `direct_limits` among them.
        native_limits: the `limits` of any other native backend that is for some calls only.
    """
    kinds = {
        "native": (native_refusal(op) if native is None else step_refusal(op), frozenset({"cpu"})),
        "triton": (triton, frozenset({"cuda"})),
        "chunked": (serves_everything, None),
        "reference": (serves_everything, frozenset()),
    }
    limits = {"native": native or native_limits, "triton": triton_limits}
    return tuple(
        Backend(
            name=name,
            module=f".{op}.{name}",
            function=f"{op}_{name}",
            limits=limits.get(name, serves_everything),
            refuse=kinds[name][0],
            devices=kinds[name][1],
        )
        for name in names
    )
