"""What our custom ops compute, for torch's flop counter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..utils.private_torch import argument_names
from .registry import Arguments, ops

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Formula = Callable[[Arguments], float]


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
        if op.flops is None:
            continue
        for backend in op.backends:
            if backend.name != "triton" or importlib.util.find_spec("triton") is not None:
                backend.load()
                formulas = {f"{op.name}_{backend.name}": op.flops} | dict(op.parts)
                _register(formulas, flop_registry, register_flop_formula)
    return FlopCounterMode(**options)


def _register(formulas: Mapping[str, Formula], known: Mapping[Any, Any], register: Callable[..., Any]) -> None:
    """Make known the custom ops "omnimix::<name>" and "..._backward", where there are such."""
    for name, formula in formulas.items():
        for custom_op, times in ((name, 1), (f"{name}_backward", 2)):
            packet = getattr(torch.ops.omnimix, custom_op, None)
            if packet is not None and packet not in known:
                register(packet, get_raw=True)(_counted(formula, packet, times))


def _counted(formula: Formula, packet: Any, times: int) -> Callable[..., int]:
    names = argument_names(packet)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(times * formula(dict(zip(names, args, strict=False)) | kwargs))

    return count
