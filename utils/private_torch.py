"""What omnimix uses of torch that torch keeps private; no other file does.

`tests/utils/test_private_torch.py` says when a release of torch changes one of them. What is called in every forward is
torch's own function under another name, not a function around it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from torch._C import _get_tracing_state as tracing_state
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import peek_interpreter_stack as innermost_transform
from torch._ops import OpOverloadPacket
from torch.autograd import forward_ad
from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "COMPILED",
    "CONSTANT_MARK",
    "argument_names",
    "buffers_outside_state_dict",
    "differentiates_forward",
    "dispatch_modes",
    "foreach_lerp_",
    "foreach_mul_",
    "innermost_transform",
    "inside_compiled",
    "multiplies_bf16",
    "pytree",
    "tracing_state",
    "untouched",
    "without_modes",
]

# torch's stubs do not say that these are in `torch`.
foreach_lerp_, foreach_mul_ = torch._foreach_lerp_, torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
# A function with this attribute is called by torch.compile while it traces, and its result kept as a constant.
CONSTANT_MARK = "_dynamo_marked_constant"
# The module inside torch.compile's wrapper; a part of the names in its state dict.
COMPILED = "_orig_mod"


def untouched(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of the layer is x Wᵀ + b and nothing else: no adapter in its place, no hook, no other `forward`.

    These are what `nn.Module.__call__` looks at.
    """
    return (
        type(layer) is nn.Linear
        and not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)
        and "forward" not in layer.__dict__
        and not _has_any_global_hook()
    )


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products (AVX512-BF16 or AMX)."""
    return _is_avx512_bf16_supported() or _is_amx_tile_supported()


def argument_names(op: OpOverloadPacket) -> list[str]:
    """The arguments of a custom op's default overload."""
    return [argument.name for argument in op.default._schema.arguments]


def buffers_outside_state_dict(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out (`persistent=False`)."""
    return module._non_persistent_buffers_set


def inside_compiled(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped; None where it is no such wrapper."""
    return getattr(module, COMPILED, None)
