"""Layers side by side on the same tokens (Hymba, arXiv 2411.13676; Falcon-H1, arXiv 2507.22448)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..block import added
from ..config import FFNConfig, MixerConfig, Site, configured
from ..context import Context
from ..ffn import FFNS
from ..layer import Capabilities, Output, SequenceLayer
from ..norm import RMSNorm
from ..registry import build_part, entry_of
from ..state import State
from .base import WrapperConfig, register_wrapper


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(WrapperConfig):
    """Options of `parallel`; "a+b" in a pattern is a short form of it.

    Args:
        parts: mixers and feed-forward layers, by configuration or name.
        fuse: "norm_mean", the mean of the outputs, each normalised and scaled by channel (Hymba); "sum", their sum.
        scales: constant factors of the outputs, one per part; 1 by default.
    """

    parts: tuple[MixerConfig | FFNConfig | str, ...]
    fuse: Literal["norm_mean", "sum"] = "norm_mean"
    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ConfigError(f"ParallelConfig.parts is {self.parts}; it must hold two parts or more")
        if self.scales is not None and len(self.scales) != len(self.parts):
            raise ConfigError(f"ParallelConfig.scales holds {len(self.scales)} factors for {len(self.parts)} parts")
        object.__setattr__(self, "parts", tuple(_part(part) for part in self.parts))


def _part(part: MixerConfig | FFNConfig | str) -> MixerConfig | FFNConfig:
    if not isinstance(part, str):
        return part
    return configured(FFNConfig if part in FFNS.names() else MixerConfig, part)


@register_wrapper(
    "parallel",
    ParallelConfig,
    summary="several layers on the same tokens, fused",
    source="arXiv 2411.13676, 2507.22448",
    examples=(),
)
class Parallel(SequenceLayer):
    """Σ or mean of the parts' outputs. It can do what all its parts can."""

    parts: Mapping[str, SequenceLayer]

    def __init__(self, dim: int, config: ParallelConfig, site: Site):
        super().__init__()
        self.fuse, self.scales = config.fuse, config.scales or (1.0,) * len(config.parts)
        parts: dict[str, nn.Module] = {}
        for part in config.parts:
            kind = entry_of(part).name
            parts[kind if kind not in parts else f"{kind}-{len(parts)}"] = build_part(part, dim, site)
        # What torch's containers hold, type checkers do not know.
        self.parts = cast("Mapping[str, SequenceLayer]", nn.ModuleDict(parts))
        norms = parts if config.fuse == "norm_mean" else ()
        self.norms = nn.ModuleDict({name: RMSNorm(dim, eps=site.norm_eps) for name in norms})
        self.capabilities = Capabilities.joined((p.capabilities for p in self.parts.values()), sequential=False)

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context, outputs, states, losses, shared = Context.of(context), [], {}, {}, {}
        for (name, part), scale in zip(self.parts.items(), self.scales, strict=True):
            out = part(x, context, None if state is None else state.get(name))
            y = self.norms[name](out.y) if self.fuse == "norm_mean" else out.y
            outputs.append(y if scale == 1 else y * scale)
            losses, shared = added(losses, out.losses), {**shared, **out.shared}
            if out.state is not None:
                states[name] = out.state
        total = outputs[0]
        for y in outputs[1:]:
            total = total + y
        total = total / len(self.parts) if self.fuse == "norm_mean" else total
        return Output(total, State(states) if states else None, losses, shared)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State | None:
        states = {name: part.init_state(batch, device=device, dtype=dtype) for name, part in self.parts.items()}
        states = {name: state for name, state in states.items() if state is not None}
        return State(states) if states else None

    def residual_outputs(self) -> list[nn.Module]:
        # Norms after the parts set the scale of what is written.
        return [] if self.fuse == "norm_mean" else [o for part in self.parts.values() for o in part.residual_outputs()]
