"""The registry of layers around layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ...errors import ConfigError
from ..block import Block
from ..config import INHERIT, BlockConfig, FFNConfig, MixerConfig, ResidualConfig, Site, configured
from ..context import Context
from ..layer import Output, SequenceLayer
from ..layout import Layout
from ..registry import Registry
from ..scan import scan_orders
from ..state import State


@dataclass(frozen=True, kw_only=True)
class WrapperConfig(MixerConfig):
    """Base of the options of wrappers, which stand where a mixer may."""


WRAPPERS: Registry[SequenceLayer] = Registry("wrapper", base=WrapperConfig)
register_wrapper = WRAPPERS.register


class InnerBlock(Block):
    """A block inside a wrapper: tokens in and tokens out, whatever the stream between its parts."""

    def forward(self, x: Tensor, context: Context | Layout, state: State | None = None) -> Output:
        out = super().forward(self.first.open(x), context, state)
        return out._replace(y=self.last.close(out.y))


def inner_block(dim: int, entry: BlockConfig | str, site: Site) -> InnerBlock:
    """A block inside a wrapper."""
    entry = _resolved(entry)
    if entry.scan != INHERIT:
        site = dataclasses.replace(site, scan=scan_orders(entry.scan))
    return InnerBlock(dim, entry, site)


def _resolved(entry: BlockConfig | str) -> BlockConfig:
    """An entry outside a pattern, which has no backbone to inherit from: by default without ffn, residual "pre"."""
    entry = BlockConfig.of(entry)
    if entry.tie is not None:
        raise ConfigError(
            f"BlockConfig.tie is {entry.tie!r} of a block inside a wrapper, without effect; set it on the entry "
            "of the pattern that holds the wrapper"
        )
    return BlockConfig(
        mixer=configured(MixerConfig, entry.mixer),
        ffn=None if entry.ffn == INHERIT else configured(FFNConfig, entry.ffn),
        residual=configured(ResidualConfig, "pre" if entry.residual == INHERIT else entry.residual),
        scan=entry.scan,
    )
