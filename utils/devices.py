"""What torch can use on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch


def devices() -> list[str]:
    """The device types that torch can use here, the CPU last."""
    import torch

    found = [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
    return [*found, "cpu"]


def native_bf16() -> bool:
    """Whether this CPU has bf16 products (AVX512-BF16 or AMX)."""
    from .private_torch import multiplies_bf16

    return multiplies_bf16()


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: torch cannot use it on this machine, with the reason.
    """
    import torch

    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {name!r}, which torch cannot use here: {reason}") from error


def where_on(device: torch.device) -> str:
    """A device for the title of a table, with the threads of a CPU."""
    import torch

    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
