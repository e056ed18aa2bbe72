"""Rotary position embedding (arXiv 2104.09864): from positions to the angles of `omnimix.kernels.rotary`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import kernels
from ..errors import UnsupportedShape
from ..utils.modes import observed, outliving_modes
from .config import bounded
from .typed import Config

# YaRN's limits between what is stretched and what is not, in rotations over the trained length (section 3.2).
SLOW, FAST = 1.0, 32.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """How a model trained on short sequences is stretched to longer ones.

    Args:
        kind: "linear" divides every frequency by the factor (arXiv 2306.15595); "ntk" raises the base, so that the
            slowest pair is divided by it and the fastest stays (arXiv 2309.00071, definition 1); "yarn" divides the
            slow pairs and leaves those that turn often within the trained length, and sharpens the attention
            (arXiv 2309.00071, section 3).
        factor: new length over trained length, at least 1.
        trained: the length that the model was trained on ("yarn").
    """

    kind: Literal["linear", "ntk", "yarn"] = "yarn"
    factor: float = 1.0
    trained: int = 4096

    def __post_init__(self) -> None:
        bounded(self, "factor", "trained", least=1, wanted="at least 1 and finite")


def rotary(
    x: Float[Tensor, "b t h k"],
    positions: Int[Tensor, "b t"],
    base: float = 10_000.0,
    *,
    channels: int | None = None,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "b t h k"]:
    """Turn pair i of r by the angle position · base^(-i/r); the angles are float32 or wider.

    Args:
        x: queries or keys.
        positions: of each token, within its own sequence where several are packed.
        base: of the frequencies.
        channels: how many to turn, from the first on; all by default. An odd last one stays as it is.
        interleaved: whether neighbours are pairs, or halves; see `omnimix.kernels.rotary`.
        scaling: for sequences longer than the model was trained on.

    Raises:
        UnsupportedShape: more channels than x has, or fewer than 2.
    """
    channels = x.shape[-1] if channels is None else channels
    if not 2 <= channels <= x.shape[-1]:
        raise UnsupportedShape(f"channels: {channels} of x's {x.shape[-1]}; at least 2 are turned")
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = frequencies(channels // 2, base, scaling=scaling, device=x.device, dtype=wide)
    if positions.stride(0) == 0:
        # Rows of a batch mostly share their positions, and then their angles.
        angle = (positions[:1].to(wide)[..., None] * frequency).expand(x.shape[0], -1, -1)
    else:
        angle = positions.to(wide)[..., None] * frequency
    turned = kernels.rotary(x, angle, interleaved=interleaved)
    # YaRN's temperature: on both queries and keys, hence its root on each (arXiv 2309.00071, eq. 22).
    if scaling is None or scaling.kind != "yarn":
        return turned
    return turned * (0.1 * math.log(scaling.factor) + 1)


def frequencies(
    pairs: int,
    base: float = 10_000.0,
    *,
    scaling: RopeScaling | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " r"]:
    """base^(-i/r) for i = 0 ... r - 1, in radians a position, scaled; they are not to be changed."""
    if observed() or torch.device(device).type != "cpu":
        return _frequencies(pairs, base, scaling, device, dtype)
    return _kept_frequencies(pairs, base, scaling, dtype)


@lru_cache(maxsize=256)
def _kept_frequencies(pairs: int, base: float, scaling: RopeScaling | None, dtype: torch.dtype) -> Tensor:
    """Every layer of a model asks for the same ones in every call."""
    with outliving_modes():
        return _frequencies(pairs, base, scaling, "cpu", dtype)


def _frequencies(
    pairs: int, base: float, scaling: RopeScaling | None, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    if scaling is not None and scaling.kind == "ntk" and pairs > 1:
        base *= scaling.factor ** (pairs / (pairs - 1))
    plain = base ** (-torch.arange(pairs, device=device, dtype=dtype) / pairs)
    if scaling is None or scaling.kind == "ntk":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.trained * plain / (2 * math.pi)
    kept = ((turns - SLOW) / (FAST - SLOW)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)
