"""One block, which knows nothing of its mixer, its feed-forward layer or its residual form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import BlockConfig, Site
from .context import Context
from .layer import Capabilities, Output, SequenceLayer
from .layout import Layout
from .registry import build_part
from .residual.base import Residual
from .serialization import current_name
from .state import State


class Block(SequenceLayer):
    """A mixer and a feed-forward layer, each inside its residual form; either may be missing.

    Args:
        dim: width of the tokens.
        config: one entry of `BackboneConfig.layers`, with nothing left to inherit.
        site: where the block stands.
        drop_path: the rate at which a sequence skips either layer, in training.
    """

    mixer_residual: Residual
    mixer: SequenceLayer | None
    ffn_residual: Residual
    ffn: SequenceLayer | None

    def __init__(self, dim: int, config: BlockConfig, site: Site, drop_path: float = 0.0):
        super().__init__()
        self.mixer = self.ffn = None
        if config.mixer is not None:
            self.mixer_residual = build_part(config.residual, dim, site, drop_path)
            self.mixer = build_part(config.mixer, dim, site)
        if config.ffn is not None:
            self.ffn_residual = build_part(config.residual, dim, site, drop_path)
            self.ffn = build_part(config.ffn, dim, site)
        residuals = [residual for _, residual, _ in self.parts()]
        joined = Capabilities.joined(layer.capabilities for _, _, layer in self.parts())
        reads = joined.reads.union(*(residual.reads for residual in residuals))
        self.capabilities = dataclasses.replace(joined, reads=reads)

    @property
    def first(self) -> Residual:
        """The residual form that opens a stream before this block."""
        return self.parts()[0][1]

    @property
    def last(self) -> Residual:
        """The residual form that closes a stream after this block."""
        return self.parts()[-1][1]

    def parts(self) -> list[tuple[str, Residual, SequenceLayer]]:
        """The name, the residual form and the layer of each part that the block has."""
        mixer, ffn = self.mixer, self.ffn
        parts: list[tuple[str, Residual, SequenceLayer]]
        parts = [] if mixer is None else [("mixer", self.mixer_residual, mixer)]
        return parts if ffn is None else [*parts, ("ffn", self.ffn_residual, ffn)]

    def forward(self, x: Float[Tensor, "b t *n d"], context: Context | Layout, state: State | None = None) -> Output:
        """The stream after the block; its state holds those of its parts, by "mixer" and "ffn"."""
        context = Context.of(context)
        states: dict[str, State] = {}
        losses, shared = {}, {}
        for name, residual, layer in self.parts():
            out = residual(x, layer, context, None if state is None else state.get(name))
            x = out.y
            if out.state is not None:
                states[name] = out.state
            if out.losses:
                losses = added(losses, out.losses)
            if out.shared:
                shared = {**shared, **out.shared}
                context = context.with_shared(out.shared)
        return Output(x, State(states) if states else None, losses, shared)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State | None:
        states = {name: layer.init_state(batch, device=device, dtype=dtype) for name, _, layer in self.parts()}
        states = {name: state for name, state in states.items() if state is not None}
        return State(states) if states else None

    def residual_outputs(self) -> list[nn.Module]:
        return [output for _, _, layer in self.parts() for output in layer.residual_outputs()]

    def residual_branches(self) -> int:
        return sum(layer.residual_branches() for _, _, layer in self.parts())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest, **options) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + current_name(name.removeprefix(prefix), inside="")] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


def added(losses: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of losses by name."""
    return {**losses, **{name: losses[name] + loss if name in losses else loss for name, loss in more.items()}}
