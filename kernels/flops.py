"""What our custom ops compute, for torch's flop counter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .registry import Backend, Op, ops

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def flop_counter(**options: Any) -> FlopCounterMode:
    """torch's FlopCounterMode, which then knows our kernels; so do all that are made later.

    It counts matrix products: a forward op as its op declares (`Op.flops`), and a backward op twice that, as torch
    counts the backward pass of a product. What an op without matrix products does is not counted, as in torch.

        with omnimix.kernels.flop_counter() as counter:
            model(x).sum().backward()
        counter.get_total_flops()

    Args:
        options: FlopCounterMode's.
    """
    # Imported here: it takes a quarter of a second.
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

    for op in ops():
        for backend in op.backends if op.flops is not None else ():
            for packet, times in _custom_ops(op, backend):
                if packet not in flop_registry:
                    register_flop_formula(packet, get_raw=True)(_formula(op, packet, times))
    return FlopCounterMode(**options)


def _custom_ops(op: Op, backend: Backend) -> list[tuple[Any, int]]:
    """The custom ops "omnimix::<op>_<backend>" and "..._backward", where there are such, and how often they count."""
    if backend.name == "triton" and importlib.util.find_spec("triton") is None:
        return []
    backend.load()
    names = ((f"{op.name}_{backend.name}", 1), (f"{op.name}_{backend.name}_backward", 2))
    return [(getattr(torch.ops.omnimix, n), times) for n, times in names if hasattr(torch.ops.omnimix, n)]


def _formula(op: Op, packet: Any, times: int) -> Callable[..., int]:
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(times * op.flops(dict(zip(names, args, strict=False)) | kwargs))

    return count
