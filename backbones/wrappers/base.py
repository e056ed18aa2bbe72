"""The registry of layers around layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..block import Block
from ..config import INHERIT, BlockConfig, MixerConfig, Site, resolved
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
    entry = resolved(entry)
    if entry.scan != INHERIT:
        site = dataclasses.replace(site, scan=scan_orders(entry.scan))
    return InnerBlock(dim, entry, site)
