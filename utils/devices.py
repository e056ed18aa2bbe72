"""What torch can use on this machine."""

from __future__ import annotations


def devices() -> list[str]:
    """The device types that torch can use here, the CPU last."""
    import torch

    found = [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
    return [*found, "cpu"]


def native_bf16() -> bool:
    """Whether this CPU has bf16 products (AVX512-BF16 or AMX)."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
