"""One block, which knows nothing of its mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .channel import CHANNELS
from .config import BackboneConfig, Site
from .layout import Layout
from .mixers import MIXERS, Mixer
from .norm import RMSNorm
from .state import State
from .wrappers.parallel import Parallel


class Block(nn.Module):
    """x + drop(mixer(norm(x))), then x + drop(channel(norm(x))).

    Args:
        config: the backbone's.
        entry: one entry of its pattern.
        site: where the block stands.
        drop_path: the rate at which a sequence skips either half, in training.
    """

    def __init__(self, config: BackboneConfig, entry: str, site: Site, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = build_mixer(config, entry, site)
        self.channel_norm = self.channel = None
        if config.channel is not None:
            self.channel_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.channel = CHANNELS.build(config.channel, config.dim, config.channels, site)

    def forward(
        self, x: Tensor, layout: Layout, state: State | None = None
    ) -> tuple[Tensor, State | None, dict[str, Tensor]]:
        """(b, t, d) to the same, the mixer's state, and the channel layer's losses."""
        mixed, state = self.mixer(self.mixer_norm(x), layout, state)
        x = x + self._drop(mixed, layout)
        losses: dict[str, Tensor] = {}
        if self.channel is not None:
            changed, losses = self.channel(self.channel_norm(x))
            x = x + self._drop(changed, layout)
        return x, state, losses

    def residual_outputs(self) -> list[nn.Module]:
        """The layers that write into the residual stream; each has a `weight`."""
        channel = [] if self.channel is None else self.channel.residual_outputs()
        return [*self.mixer.residual_outputs(), *channel]

    def _drop(self, x: Tensor, layout: Layout) -> Tensor:
        """Stochastic depth (arXiv 1603.09382), drawn once a sequence."""
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(layout.sequences(x.shape[0]), 1, 1, device=x.device) >= self.drop_path
        if layout.cu_seqlens is not None:
            keep = keep[:, 0, 0].repeat_interleave(layout.lengths(x))[None, :, None]
        return x * (keep.to(x.dtype) / (1 - self.drop_path))


def build_mixer(config: BackboneConfig, entry: str, site: Site) -> Mixer:
    """The mixer that an entry of the pattern names; "a+b" runs a and b in parallel."""
    parts = {name: MIXERS.build(name, config.dim, config.mixers, site) for name in entry.split("+")}
    return Parallel(parts, config.dim, site) if len(parts) > 1 else next(iter(parts.values()))
